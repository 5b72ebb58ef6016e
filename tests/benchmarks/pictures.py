"""What it costs to check an image file by its header and end, and to take the digest of its bytes.

    python tests/benchmarks/pictures.py --folder shared/data/bccd/JPEGImages

Prints a table of milliseconds per file, files in the page cache, one thread; `pictures.md` keeps the last one.
"""

import io
import tempfile
import time
from pathlib import Path

import click
from PIL import Image

from kdpipe.pipelines.data.images import check_picture, image_digest, image_size, load_picture

REPEATS = 5


def milliseconds(paths: list[Path], sizes: list[tuple[int, int]]) -> str:
    """A row of the table: check, digest and decoding."""
    cells = []
    for work in (check_picture, lambda path, size: image_digest(path), load_picture):
        best = min(_seconds(work, paths, sizes) for _ in range(REPEATS))
        cells.append(f"{1000 * best / len(paths):.3f}")
    return " | ".join(cells)


def _seconds(work: object, paths: list[Path], sizes: list[tuple[int, int]]) -> float:
    assert callable(work)
    start = time.perf_counter()
    for path, size in zip(paths, sizes, strict=True):
        work(path, size)
    return time.perf_counter() - start


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, exists=True), required=True, help="JPEG files.")
@click.option("--files", default=100, show_default=True, help="How many of them.")
def main(folder: Path, files: int) -> None:
    """Print the table."""
    originals = sorted(folder.glob("*.jpg"))[:files]
    print("| format | bytes, mean | check | digest | read, digest, decode |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for kind, scale in (("jpeg", 1), ("jpeg", 3), ("png", 1), ("webp", 1), ("tiff", 1), ("bmp", 1)):
            paths = []
            for original in originals:
                with Image.open(original) as image:
                    file = io.BytesIO()
                    image.resize((image.width * scale, image.height * scale)).save(file, kind)
                paths.append(Path(temporary) / f"{original.stem}-{scale}.{kind}")
                paths[-1].write_bytes(file.getvalue())
            size = sum(path.stat().st_size for path in paths) // len(paths)
            print(f"| {kind} | {size} | {milliseconds(paths, [image_size(path) for path in paths])} |")


if __name__ == "__main__":
    main()
