"""Names of image files: as annotations give them, and as they are on disk."""

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["IMAGE_SUFFIXES", "names_on_disk"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def names_on_disk(names: Sequence[str], img_dir: Path) -> tuple[list[str], tuple[str, ...]]:
    """File names that are there, where the annotations have another writing of them; and what was changed, in words.

    Backslashes of Windows become slashes, and a suffix may be in the other case. Names of which there is no file at all
    stay as they are.

    Args:
        names: relative to `img_dir`.
        img_dir: folder of the images; each folder in it is listed once.
    """
    folders: dict[str, tuple[set[str], dict[str, str]]] = {}
    disk_names, slashed, recased = [], [], []
    for name in names:
        written = name
        if "\\" in name and not (img_dir / name).exists():
            slashed.append(name)
            written = name.replace("\\", "/")
        folder, slash, file = written.rpartition("/")
        if folder not in folders:
            folders[folder] = _listed(img_dir / (folder + slash))
        files, by_key = folders[folder]
        if files and file not in files and (other := by_key.get(_key(file))) is not None:
            recased.append(name)
            written = folder + slash + other
        disk_names.append(written)
    notes = []
    if slashed:
        notes.append(f"backslashes in file names are read as slashes: {len(slashed):,} (the first: {slashed[0]})")
    if recased:
        notes.append(f"files whose suffix is in the other case are taken: {len(recased):,} (the first: {recased[0]})")
    return disk_names, tuple(notes)


def _key(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem + dot + suffix.lower()


def _listed(folder: Path) -> tuple[set[str], dict[str, str]]:
    """The files of a folder, and the same by their name with a small suffix."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return set(), {}
    return set(names), {_key(name): name for name in names}
