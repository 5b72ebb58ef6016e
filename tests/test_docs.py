"""What the documents name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
NAME = re.compile(r"(?:(?:cache|distill|pipelines|tests|docs)/[\w/.-]*|\.ci/\w+)")
BESIDE = re.compile(r"(?<![\w/.])(\w+\.py)\b")  # a second file of the folder that was named before


def named(text: str) -> list[str]:
    """Paths that a document names, `NAME` aside; a file without a folder is of the one named before it on its line."""
    paths = []
    for line in text.splitlines():
        folder = ""
        for match in re.finditer(rf"{NAME.pattern}|{BESIDE.pattern}", line):
            path = match[0].rstrip(".")
            if "/" not in path and not folder:
                continue
            path = path if "/" in path else f"{folder}/{path}"
            folder = path.rstrip("/") if path.endswith("/") else path.rpartition("/")[0]
            paths += [path] if "NAME" not in path else []
    return paths


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_that_a_document_names_are_there(document: str) -> None:
    assert [path for path in named((ROOT / document).read_text(encoding="utf-8")) if not (ROOT / path).exists()] == []


def test_paths_are_found() -> None:
    text = "see `cache/read/reader.py`, gone.py and tests/\nor alone.py\nrun .ci/run, `distill/losses/NAME.py`."
    assert named(text) == ["cache/read/reader.py", "cache/read/gone.py", "tests/", ".ci/run"]


def test_every_room_is_on_the_map() -> None:
    """Each package is named in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [
        path.parent.relative_to(ROOT).as_posix()
        for layer in ("cache", "distill", "pipelines")
        for path in (ROOT / layer).rglob("__init__.py")
    ]
    assert [room for room in rooms if f"{room}/" not in text and f", {Path(room).name}/" not in text] == []
