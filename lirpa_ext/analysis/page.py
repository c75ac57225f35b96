"""A self-contained HTML page of tables and pictures, without scripts, network access or other files.

`lirpa_ext.analysis.collect` makes one from the folder of a run, a folder of results, or a model.
"""

from __future__ import annotations

import base64
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from .._version import __version__
from ..errors import InvalidInputError, ResultsError
from ..reporting.files import write_whole
from ..reporting.plots import alt_text, image_size, read_alt, svg
from ..reporting.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Fact", "Page", "Picture", "Section", "Table", "drawn_picture", "file_picture", "markdown", "table"]

_TEMPLATE = "page.html.j2"
_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Picture:
    """An image in a page.

    Attributes:
        source: ``data:`` URI of the image.
        alt: Alt text.
        caption: Text below the image, or "".
        wide: Whether a narrow screen scrolls the image sideways and does not shrink it, as for plots side by side.

    Raises:
        InvalidInputError: The source is no such URI, or the alt text is empty.
    """

    source: str
    alt: str
    caption: str = ""
    wide: bool = False

    def __post_init__(self) -> None:
        if not self.source.startswith("data:image/") or not self.alt.strip():
            raise InvalidInputError("a picture of a page is a data: URI of an image, and has an alt text")


@dataclass(frozen=True)
class Table:
    """A table in a page.

    Attributes:
        caption: Text above the table.
        columns: Headings of the columns.
        rows: Cells of each row, as text, one for each column.
        numeric: For each column, whether it is aligned right.
        note: Text below the table, or "".
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    note: str = ""


@dataclass(frozen=True)
class Fact:
    """A number at the top of a page.

    Attributes:
        value: The number with its unit, as text.
        name: Name of the quantity.
    """

    value: str
    name: str


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: Heading.
        paragraphs: Paragraphs of plain text.
        pictures: Images.
        tables: Tables.
        html: HTML from `markdown`, which is not escaped; or None.
        code: Preformatted text, or "".
    """

    title: str
    paragraphs: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    html: Markup | None = None
    code: str = ""


@dataclass(frozen=True)
class Page:
    """A page of results.

    Attributes:
        title: Heading, and title of the window.
        facts: Numbers at the top.
        sections: Sections, in order.
        made: Last line, with the source and the date.
    """

    title: str
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]
    made: str = ""

    def html(self) -> str:
        """The page as HTML 5; all text except `Section.html` is escaped."""
        template = resources.files(__package__ or "").joinpath(_TEMPLATE).read_text(encoding="utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(template).render(page=self, version=__version__)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page.

        Raises:
            ResultsError: The file cannot be written.
        """
        write_whole(path, self.html())


def table(caption: str, rows: Sequence[Row], most: int = 0) -> Table:
    """Make a table of rows; the columns are the keys of the first row.

    Args:
        caption: Text above the table.
        rows: Dicts of plain values with the same keys; numbers are shown with four significant digits.
        most: Largest number of rows to show, evenly chosen, with the first and the last; default 0 for all.
    """
    names = list(rows[0]) if rows else []
    shown, note = list(rows), ""
    if 1 < most < len(rows):
        shown = [rows[round(k * (len(rows) - 1) / (most - 1))] for k in range(most)]
        note = f"{most} of {len(rows)} rows"
    words = [any(isinstance(row.get(name), str | bool) for row in rows) for name in names]
    cells = tuple(tuple(_cell(row.get(name)) for name in names) for row in shown)
    return Table(caption, tuple(name.replace("_", " ") for name in names), cells, tuple(not w for w in words), note)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    whole = isinstance(value, bool | numbers.Integral) or not isinstance(value, numbers.Real)
    return str(value) if whole else f"{value:.4g}"


def drawn_picture(drawn: Figure, caption: str = "") -> Picture:
    """Make a picture of a figure, as SVG; the figure must have an alt text."""
    return Picture(_uri(svg(drawn).encode(), ".svg"), alt_text(drawn), caption, _is_wide(*drawn.get_size_inches()))


def file_picture(path: Path, alt: str = "", caption: str = "") -> Picture:
    """Make a picture of an image file.

    Args:
        path: PNG, JPEG or SVG file.
        alt: Alt text; default the one in a PNG file, or else a text with the file's name.
        caption: Text below the image, default "".

    Raises:
        ResultsError: The file cannot be read, or is of another kind.
    """
    kind = path.suffix.lower()
    if kind not in _TYPES:
        raise ResultsError(f"{path} is none of {', '.join(_TYPES)}")
    own, wide = ("", False) if kind == ".svg" else (read_alt(path), _is_wide(*image_size(path)))
    if own.startswith("{"):  # meta data of a certification (`Report.plot`), no alt text
        own = ""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
    return Picture(
        _uri(content, kind), alt or own or f"Picture {path.name}, which says nothing of itself.", caption, wide
    )


def _is_wide(width: float, height: float) -> bool:
    return width > 1.8 * height


def _uri(content: bytes, kind: str) -> str:
    return f"data:{_TYPES[kind]};base64,{base64.b64encode(content).decode()}"


def markdown(text: str) -> Markup:
    """Convert Markdown with tables to HTML: headings go two levels down; raw HTML and images are disabled."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1:]) + 2, 6)}"
    made = parser.renderer.render(tokens, parser.options, {})
    opened = '<div class="scroll" role="region" aria-label="table of the model card" tabindex="0"><table>'
    return Markup(made.replace("<table>", opened).replace("</table>", "</table></div>"))
