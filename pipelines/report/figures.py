"""Figures: one style for all, in the page's own colours, light or dark; and how they get into the page."""

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

__all__ = ["COLORS", "GREYS", "Figure", "ink", "new_canvas", "paper"]

# Okabe and Ito's palette, which people with any colour vision can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
GREYS = ("#858b94", "#b4b9c0", "#5d636c")
_PAGE = {"#010203": "var(--ink)", "#040506": "var(--line)", "#070809": "var(--card)"}  # stand for the page's colours
_LIGHT = ("#1c1f24", "#dfe2e6", "#ffffff")
_ON_ANY = GREYS[0]  # is readable on black and on white
_WIDTH = 5.2  # inches of a figure that takes half of a wide page
_DPI = 120
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",  # the browser has glyphs of names in any language
    "text.parse_math": False,  # a name may hold a dollar sign
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure of the page.

    Attributes:
        name: Of its file, without a suffix.
        title: Above it.
        caption: Below it: what is seen, and of what.
        draw: Draws it, in colours of the current style (`ink`).
        is_photograph: It shows images, and is no line drawing.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Canvas]
    is_photograph: bool = False

    @property
    def html(self) -> Markup:
        """The figure inside of the page: SVG in the page's own colours; of photographs, WebP."""
        if self.is_photograph:
            image, (width, height) = self._saved("webp", (_ON_ANY,) * 3, dpi=_DPI, pil_kwargs={"quality": 80})
            address = f"data:image/webp;base64,{base64.b64encode(image).decode()}"
            return Markup('<img src="{}" alt="{}" width="{}" height="{}">').format(
                address, self.title, round(width * _DPI), round(height * _DPI)
            )
        data, _ = self._saved("svg", tuple(_PAGE), metadata={"Date": None, "Creator": None})
        text = data.decode()
        text = text[text.index("<svg") :]  # without what belongs to a file of its own
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        for color, of_page in _PAGE.items():
            text = text.replace(color, of_page)
        label = Markup('<svg role="img" aria-label="{}"').format(self.title)
        return Markup(label + Markup(text.removeprefix("<svg")))

    def png(self) -> bytes:
        """The figure for itself, dark on white."""
        return self._saved("png", _LIGHT, dpi=160, facecolor=_LIGHT[2], transparent=False)[0]

    def _saved(self, kind: str, colors: Sequence[str], **options: Any) -> tuple[bytes, tuple[float, float]]:
        """The file, and its size in inches."""
        stream = io.BytesIO()
        with _style(colors, self.name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # is drawn as a box in PNG
            canvas = self.draw()
            canvas.savefig(stream, format=kind, **{"transparent": True, **options})
        width, height = canvas.get_size_inches()
        return stream.getvalue(), (float(width), float(height))


@contextmanager
def _style(colors: Sequence[str], name: str) -> Iterator[None]:
    """The style of all figures; a matplotlibrc of the user's stays out of them."""
    text, line, paper = colors
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    style: dict[Any, Any] = {**_STYLE, **dict.fromkeys(names, text), "grid.color": line, "hatch.color": paper}
    with matplotlib.rc_context():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            matplotlib.rcdefaults()
        matplotlib.rcParams.update({**style, "svg.hashsalt": name})  # ids of one figure are not those of another
        yield


def ink() -> str:
    """Colour of text in the current style."""
    return str(matplotlib.rcParams["text.color"])


def paper() -> str:
    """Colour behind the figure in the current style."""
    return str(matplotlib.rcParams["hatch.color"])


def new_canvas(
    height: float, rows: int = 1, columns: int = 1, *, width: float = _WIDTH, **options: Any
) -> tuple[Canvas, list[Axes]]:
    """An empty figure, which no state of pyplot knows.

    Args:
        height: Inches.
        rows: Of axes.
        columns: Of axes.
        width: Inches.
        options: Of `Figure.subplots`.

    Returns:
        The figure, and its axes row by row.
    """
    canvas = Canvas(figsize=(width, height))
    axes = canvas.subplots(rows, columns, squeeze=False, **options)
    return canvas, list(axes.flat)
