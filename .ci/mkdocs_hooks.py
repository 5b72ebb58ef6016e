"""Pages of the documentation site that are files elsewhere in the tree, such as the README, which is its home."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# as they are, under the same path
PAGES |= {name: name for name in ("LICENSE", "CITATION.cff")}
PAGES |= {f"examples/{path.name}": f"examples/{path.name}" for path in sorted((ROOT / "examples").iterdir())}
PAGES |= {
    f"tests/benchmarks/{path.name}": f"benchmarks/{path.name}" for path in sorted(ROOT.glob("tests/benchmarks/*.md"))
}
SOURCES = {target: source for source, target in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files that are not below docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links between files of the tree lead to the same pages of the site."""
    uri = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(uri, f"docs/{uri}"))

    def on_site(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        target = PAGES.get(path, path.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(on_site, markdown)
