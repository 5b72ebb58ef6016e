"""The page: sections of text, figures and tables, in one HTML file that needs nothing else."""

import base64
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.report.figures import Figure

__all__ = ["NOTHING", "Cell", "Section", "Table", "check_out", "render_page", "write_figures", "write_page"]

NOTHING = "—"  # in a cell of a table
_MARK = b'<meta name="generator" content="kdpipe'  # of what may be replaced


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        key: What its column is sorted by, where that is a number.
        strong: It stands out.
    """

    text: str
    key: float | None = None
    strong: bool = False

    @property
    def script_key(self) -> str:
        """The key as JavaScript reads numbers."""
        return str(self.key).replace("inf", "Infinity")


@dataclass(frozen=True)
class Table:
    """A table, which a click on a column sorts.

    Attributes:
        columns: Their heads.
        rows: A cell per column, text or `Cell`.
        caption: What it says.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""

    def is_number(self, column: int) -> bool:
        """Whether all cells of a column are sorted as numbers."""
        return bool(self.rows) and all(row[column].key is not None for row in self.cells())

    def cells(self) -> Iterator[list[Cell]]:
        """The rows, all of `Cell`."""
        for row in self.rows:
            yield [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]


@dataclass
class Section:
    """A section of the page.

    Attributes:
        name: Its anchor.
        title: Its heading.
        intro: What is seen, in a sentence or two.
        tables: Come first.
        figures: Then these.
        notes: What is missing, and why; a sentence each.
        code: Lines to copy, such as command lines.
    """

    name: str
    title: str
    intro: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_gallery(self) -> bool:
        """Whether all figures show images, in an order that counts."""
        return all(figure.is_photograph for figure in self.figures)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.tables or self.figures or self.notes or self.code)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("kdpipe.pipelines.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_page(title: str, subtitle: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page as HTML.

    Args:
        title: Of the page.
        subtitle: Below it.
        facts: Name and value of what is said first, in large.
        sections: Those that are empty are left out.
    """
    environment = _environment()
    loader: Any = environment.loader
    style, script = (loader.get_source(environment, name)[0] for name in ("style.css", "table.js"))
    return environment.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        sections=[section for section in sections if not section.is_empty],
        version=version("kdpipe"),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(style),
        script=Markup(script),
        script_digest=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )


def check_out(path: Path) -> None:
    """Refuse to replace a file that no report of kdpipe is.

    Raises:
        KdpipeError: Naming it.
    """
    if path.is_dir():
        raise KdpipeError(f"{path} is a folder: name the file that the report is written to (--out).")
    if path.exists() and _MARK not in path.read_bytes()[:2000]:
        raise KdpipeError(
            f"{path} is there and was not written by kdpipe report: choose another file (--out), or move it away."
        )


def write_page(path: Path, html: str) -> None:
    """Write a page in one atomic act.

    Args:
        path: The file, as `check_out` let it pass.
        html: As `render_page` gives it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(html, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_figures(folder: Path, sections: Sequence[Section]) -> list[Path]:
    """Write each figure as PNG.

    Args:
        folder: Is made where it is missing; files of the same names are replaced.
        sections: Whose figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in (figure for section in sections for figure in section.figures):
        path = folder / f"{figure.name}.png"
        path.write_bytes(figure.png())
        paths.append(path)
    return paths
