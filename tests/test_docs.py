"""What the documents name exists."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdpipe.pipelines.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
NAME = re.compile(r"(?:(?:cache|distill|pipelines|tests|docs|examples)/[\w/.-]*|\.ci/\w+)")
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
    """Each package is named in docs/explanation/architecture.md."""
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    rooms = [
        path.parent.relative_to(ROOT).as_posix()
        for layer in ("cache", "distill", "pipelines")
        for path in (ROOT / layer).rglob("__init__.py")
    ]
    assert [room for room in rooms if f"{room}/" not in text and f", {Path(room).name}/" not in text] == []


def headings(text: str) -> set[str]:
    """Names by which links reach the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_pages_and_headings(document: str) -> None:
    path = ROOT / document
    dead = []
    for file, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        target = (path.parent / file).resolve() if file else path
        if not target.is_file() or (anchor and anchor not in headings(target.read_text(encoding="utf-8"))):
            dead.append(f"{file}#{anchor}")
    assert dead == []


def test_a_dead_link_is_found() -> None:
    text = "[a](b.md), [c](d.md#e-f) and [g](https://example.org/h.md)"
    assert LINK.findall(text) == [("b.md", ""), ("d.md", "e-f")]
    assert headings("# What `ckd` teaches\n```\n# no\n```\n## RoIs, and the teacher's") == {
        "what-ckd-teaches",
        "rois-and-the-teachers",
    }


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command line of kdpipe in the code blocks of a page, from `kdpipe` on."""
    text = re.sub(r"(?m)\s#.*$", "", re.sub(r"\\\n\s*", " ", text))
    for line in re.findall(r"^ {4,}.*\bkdpipe .*$|^.*`kdpipe [^`]+`.*$", text, re.MULTILINE):
        for part in re.findall(r"`(kdpipe [^`]+)`", line) or re.findall(r"(?<![\w./:-])kdpipe [a-z-].*", line):
            yield shlex.split(re.sub(r"[;&>|<].*|`", "", part))


def unknown(words: list[str]) -> list[str]:
    """What of a command line is no command or option of kdpipe."""
    names = [word for word in words[1:] if not word.startswith("-")]
    command = cli.commands.get(names[0]) if names else cli
    if command is None:
        return [names[0]] if names[0].islower() else []  # COMMAND stands for any
    known = {name for each in (command, cli) for param in each.params for name in (*param.opts, *param.secondary_opts)}
    options = [word.split("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    return [option for option in options if option not in {*known, "-h", "--help"}]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_those_of_the_command_line(document: str) -> None:
    found = list(commands((ROOT / document).read_text(encoding="utf-8")))
    assert [(" ".join(words), what) for words in found if (what := unknown(words))] == []


def test_commands_and_their_faults_are_found() -> None:
    text = "    kdpipe train-student --cache a --mehtods x \\\n  --seed 1   # --no\n`kdpipe reprot W` and kdpipe\n"
    found = list(commands(text))
    assert [words[1] for words in found] == ["train-student", "reprot"]
    assert [unknown(words) for words in found] == [["--mehtods"], ["reprot"]]


def test_options_that_pages_name_exist() -> None:
    """Each `--option` in the prose of a page is one of some command, or of a program named here."""
    others = {"--array", "--cpus-per-task", "--max-restarts"}  # of sbatch and torchrun
    known = {name for each in (cli, *cli.commands.values()) for param in each.params for name in param.opts}
    named_options = {
        (page, option)
        for page in PAGES
        for option in re.findall(r"`(--[a-z][a-z-]+)", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert named_options
    assert {x for x in named_options if x[1] not in known | others} == set()


def test_the_readme_is_short_and_begins_with_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line.split("#")[0].strip() for line in lines[:2]] == ["make demo", "make test"]


def test_the_citation_has_the_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    """Every page is reached by the menu, and every link and object that a page names exists."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    assert [name for name in cli.commands if f"kdpipe {name}" not in reference] == []
    assert "--cache PATH|URL" in reference
    assert "UNSET" not in reference
    assert "<math" in (tmp_path / "site" / "explanation" / "equations" / "index.html").read_text(encoding="utf-8")
