"""The page: strangers' names are text, and nothing else is replaced by it."""

import base64
import re
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure as Canvas

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.report.figures import Figure, ink, new_canvas
from kdpipe.pipelines.report.page import Cell, Section, Table, check_out, render_page, write_figures, write_page

EVIL = "<img src=x onerror=alert(1)>&\"'$_{"


def draw() -> Canvas:
    canvas, (axes,) = new_canvas(2)
    axes.plot([0, 1], [0, 1], label=EVIL, color=ink())
    axes.set_title(EVIL)
    axes.set_yticks([0], [EVIL])
    axes.legend()
    return canvas


def evil_section() -> Section:
    return Section(
        "section",
        EVIL,
        EVIL,
        [Table((EVIL,), [[EVIL], [Cell(EVIL, 1.0, strong=True)]], EVIL)],
        [Figure("line", EVIL, EVIL, draw), Figure("photo", EVIL, EVIL, draw, is_photograph=True)],
        [EVIL],
        [(EVIL, EVIL)],
    )


class Tags(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_name_that_is_markup_is_shown_as_text() -> None:
    html = render_page(EVIL, EVIL, [(EVIL, EVIL)], [evil_section()])
    page = Tags(html)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [(image["src"] or "")[:15] for image in images] == ["data:image/webp"]
    assert images[0]["alt"] == EVIL
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert page.text.count(EVIL) >= 14  # title, headings, cells, captions, and within the figure


def test_the_page_needs_no_network_and_runs_its_own_script_only() -> None:
    html = render_page("a", "b", [], [evil_section()])
    page = Tags(html)
    assert not [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith(("data:", "#"))
    ]
    assert "url(http" not in html
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    (digest,) = re.findall(r"script-src 'sha256-([^']+)'", html)
    assert digest == base64.b64encode(sha256(script.encode()).digest()).decode()


def test_figures_have_the_colours_of_the_page_or_their_own() -> None:
    figure = Figure("line", "a", "b", draw)
    assert "var(--ink)" in figure.html
    assert "#010203" not in figure.html
    assert figure.png().startswith(b"\x89PNG")


def test_empty_sections_are_left_out() -> None:
    page = Tags(render_page("a", "b", [], [Section("empty", "nothing", "here"), evil_section()]))
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == ["section"]


def test_what_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    check_out(path)
    write_page(path, render_page("a", "b", [], []))
    check_out(path)
    path.write_text("<html>mine</html>")
    with pytest.raises(KdpipeError, match="was not written by kdpipe report"):
        check_out(path)
    with pytest.raises(KdpipeError, match="is a folder"):
        check_out(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_figures_alone(tmp_path: Path) -> None:
    paths = write_figures(tmp_path / "figures", [evil_section()])
    assert [path.name for path in paths] == ["line.png", "photo.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
