"""One style for all plots, and figures with alt texts. Lines differ in colour (safe for colour blindness) and dash.

Figures are made without pyplot, so that there is no global state and no graphical backend.
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

# M. Okabe, K. Ito: Color universal design (2008), without the yellow, which is not visible as a line on white.
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

SIZE = (5.4, 3.8)  # inches; the text stays readable on a phone, 340 points wide


def figure(
    alt: str, rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Make a figure and its axes, with a light grid and without a frame at the top and on the right.

    Args:
        alt: Alt text, for readers who cannot see the figure: kind of plot, axes, result. `describe` changes it.
        rows: Number of rows of axes, default 1.
        columns: Number of columns of axes, default 1.
        size: Width and height in inches, default `SIZE`, scaled with the rows and columns.
        **options: Options of matplotlib's ``Figure.subplots``, such as ``sharex=True``.

    Returns:
        The figure, and an array of axes of shape (rows, columns).

    Raises:
        InvalidInputError: The alt text is empty.
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
    """Keyword arguments for matplotlib of a line in a plot; no two of the first 7 share colour, dash or marker.

    Args:
        number: Number of the line, from 0; from 7 on, colours are repeated with other dashes.
        markers: Whether the line has markers, default True; pass False for lines of hundreds of points.
    """
    names, count = list(COLORS), len(COLORS)
    line = {"color": COLORS[names[number % count]], "linestyle": _LINES[(number + number // count) % count]}
    return line | ({"marker": _MARKERS[(number + number // count) % count], "markersize": 4.5} if markers else {})


def describe(drawn: Figure, alt: str) -> None:
    """Set the alt text of a figure.

    Raises:
        InvalidInputError: The alt text is empty.
    """
    if not alt.strip():
        raise InvalidInputError("a figure needs an alt text: say what it shows")
    drawn.set_label(alt)


def alt_text(drawn: Figure) -> str:
    """The alt text of a figure; "" if it has none."""
    return str(drawn.get_label() or "")


def save(drawn: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, with its alt text in the file's meta data (`read_alt`); the folder is made if needed.

    Args:
        drawn: The figure.
        path: File to write, ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        InvalidInputError: The figure has no alt text.
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
    """A figure as the text of an SVG file, with letters as outlines; the same figure always gives the same text."""
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.hashsalt": "lirpa_ext"}):  # else ids are drawn at random
        drawn.savefig(written, format="svg", metadata={"Date": None, "Description": alt_text(drawn)})
    return written.getvalue()


def read_alt(path: str | os.PathLike[str]) -> str:
    """The alt text that `save` put into a PNG file; "" if there is none.

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
