"""The page in a real browser: Debian's Chromium, or Playwright's own."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

pytestmark = pytest.mark.slow
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as driver:
        try:
            # as root, in a container, Chromium has no sandbox of its own; it opens our own page only
            chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"No browser: apt-get install chromium ({str(error).splitlines()[0]})")
        yield chromium
        chromium.close()


def opened(browser: Any, page: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """A page, and what its console and the network had to say."""
    tab = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme).new_page()
    said: list[str] = []

    def requested(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            said.append(request.url)

    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.on("request", requested)
    tab.goto(page.as_uri())
    return tab, said


def test_the_page_in_a_browser(kit: "Kit", trainings: Path, evil_trainings: Path, browser: Any) -> None:
    for folder in (trainings, evil_trainings):
        kit.run("report", folder, "--cache", kit.cache)
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                tab, said = opened(browser, folder / "report.html", width, scheme)
                assert said == []
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                assert tab.evaluate("document.images.length") >= 3
                assert tab.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
                assert tab.evaluate("[...document.querySelectorAll('figure svg')].every(svg => svg.clientWidth > 200)")
                background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (background == "rgb(255, 255, 255)") == (scheme == "light")
                tab.context.close()
    (trainings / "report.html").unlink()


def test_a_click_sorts_the_table(kit: "Kit", trainings: Path, tmp_path: Path, browser: Any) -> None:
    kit.run("report", trainings, "--cache", kit.cache, "--out", tmp_path / "page.html")
    tab, said = opened(browser, tmp_path / "page.html", 1280, "light")
    cells = "[...document.querySelectorAll('#results tbody tr')].map(row => row.cells[{}].{})"
    for column, value in ((1, "dataset.key"), (3, "dataset.key"), (0, "textContent")):
        head = tab.locator(f"#results th:nth-child({column + 1})")
        head.locator("button").click()
        rising = tab.evaluate(cells.format(column, value))
        assert rising == sorted(rising, key=float if column else str)
        assert column != 3 or (rising[0], float(rising[-1]) > -1) == ("-Infinity", True)
        assert head.get_attribute("aria-sort") == "ascending"
        head.locator("button").click()
        assert tab.evaluate(cells.format(column, value)) == rising[::-1]
    assert len(rising) == 3
    assert said == []
