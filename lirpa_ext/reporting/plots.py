"""One style for all plots: colours safe for colour blindness, told apart by line and marker too, with an alt text.

Figures are made without pyplot: no global state, no backend but Agg, SVG or PDF at the time of saving.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError, ResultsError
from .files import make_folder, write_whole

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["COLORS", "SIZE", "alt_text", "describe", "figure", "image_size", "read_alt", "save", "style", "svg"]

# M. Okabe, K. Ito: Color universal design (2008). Their yellow is left out: as a line on white it is not seen.
COLORS = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
    "black": "#000000",
}
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

SIZE = (5.4, 3.8)  # inches: the words stay readable where a phone shows it 340 points wide


def figure(
    alt: str, rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, with a light grid and without a frame at the top and on the right.

    Args:
        alt: What a reader who cannot see it should know: kind of plot, axes, what it shows. `describe` changes it.
        rows: Rows of axes, default 1.
        columns: Columns of axes, default 1.
        size: Width and height in inches, default `SIZE`, higher for more rows and wider for more columns.
        **options: Of matplotlib's ``Figure.subplots``, such as ``sharex=True``.

    Returns:
        The figure, and an array of axes of shape (rows, columns).
    """
    from matplotlib.figure import Figure  # slow to import

    width, height = SIZE
    made = Figure(figsize=size or (width * columns, height * (1 + 0.7 * (rows - 1))), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    describe(made, alt)
    return made, axes


def style(number: int, markers: bool = True) -> dict[str, Any]:
    """Keyword arguments of the line of a number: no two of the first 7 share colour, dash or marker.

    Args:
        number: Counted from 0; from 7 on colours come again with other dashes.
        markers: Whether to have a marker, default yes; not for lines of hundreds of points.
    """
    names, count = list(COLORS), len(COLORS)
    line = {"color": COLORS[names[number % count]], "linestyle": _LINES[(number + number // count) % count]}
    return line | ({"marker": _MARKERS[(number + number // count) % count], "markersize": 4.5} if markers else {})


def describe(drawn: Figure, alt: str) -> None:
    """Give a figure its alt text.

    Raises:
        InvalidInputError: It is empty.
    """
    if not alt.strip():
        raise InvalidInputError("a figure needs an alt text: say what it shows")
    drawn.set_label(alt)


def alt_text(drawn: Figure) -> str:
    """The alt text of a figure, "" if it has none."""
    return str(drawn.get_label() or "")


def save(drawn: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, SVG or PDF, with its alt text in the file (`read_alt`).

    Raises:
        InvalidInputError: It has no alt text.
        ResultsError: The file cannot be written, or its suffix is unknown.
    """
    if not alt_text(drawn):
        raise InvalidInputError("this figure has no alt text: call lirpa_ext.reporting.plots.describe first")
    kind = Path(path).suffix.lower()
    fields = {".png": "Description", ".svg": "Description", ".pdf": "Subject"}
    if kind not in fields:
        raise ResultsError(f"{path} must end in {', '.join(fields)}")
    written = io.BytesIO()
    drawn.savefig(written, format=kind[1:], dpi=150, metadata={fields[kind]: alt_text(drawn)})
    make_folder(Path(path).parent)
    write_whole(path, written.getbuffer())


def svg(drawn: Figure) -> str:
    """A figure as the text of an SVG file, letters as outlines, the same whenever it is drawn."""
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.hashsalt": "lirpa_ext"}):  # else ids are drawn at random
        drawn.savefig(written, format="svg", metadata={"Date": None, "Description": alt_text(drawn)})
    return written.getvalue()


def read_alt(path: str | os.PathLike[str]) -> str:
    """The alt text that `save` put into a PNG file, "" if there is none.

    Raises:
        ResultsError: The file is no image, or cannot be read.
    """
    return str(_image(path)[1].get("Description", ""))


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of a PNG or JPEG file in pixels.

    Raises:
        ResultsError: The file is no image, or cannot be read.
    """
    return _image(path)[0]


def _image(path: str | os.PathLike[str]) -> tuple[tuple[int, int], dict[Any, Any]]:
    from PIL import Image  # of matplotlib

    try:
        with Image.open(path) as image:
            return image.size, dict(image.info)
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} is no image: {error}") from error
