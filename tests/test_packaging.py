"""The wheel holds what the tree holds."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cache", "distill", "pipelines")
# Names under which distributions are imported, where they differ.
IMPORTED_AS = {
    "google-crc32c": "google_crc32c",
    "mmcv-lite": "mmcv",
    "opencv-python": "cv2",
    "pillow": "PIL",
}
# Distributions that no module of ours imports, and who does.
IMPORTED_BY_OTHERS = {
    "setuptools": "mmengine: pkg_resources",
    "tensorboard": "mmengine: TensorboardVisBackend",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built aside from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    tree = {
        f"kdpipe/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == tree


def test_the_wheel_carries_version_licence_and_readme(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert f"\nVersion: {version('kdpipe')}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_changelog_has_the_version() -> None:
    assert f"\n## [{version('kdpipe')}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_command_is_installed() -> None:
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "kdpipe"]
    assert script.value == "kdpipe.pipelines.cli.main:main"


def test_what_is_imported_is_declared_and_the_other_way_round(wheel: Path) -> None:
    lines = [line for line in metadata_of(wheel).splitlines() if line.startswith("Requires-Dist:")]
    extras = ("aws", "ray")  # of which a user is told when something needs them
    declared = {
        re.split(r"[^\w.-]", line.split()[1])[0]
        for line in lines
        if "extra ==" not in line or any(f'extra == "{extra}"' in line for extra in extras)
    }
    assert declared >= set(IMPORTED_BY_OTHERS)
    declared_modules = {IMPORTED_AS.get(name, name) for name in declared - set(IMPORTED_BY_OTHERS)}
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    imported_names = {name for path in modules for name in imported(path)}
    assert imported_names - set(sys.stdlib_module_names) - {"kdpipe"} == declared_modules


def imported(path: Path) -> Iterator[str]:
    """First names of what a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name.split(".")[0] for name in names)


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("info/METADATA"))).decode()
