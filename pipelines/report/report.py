"""`kdpipe report`: a page about trainings, or about a cache."""

import json
from pathlib import Path

from rich.console import Console

from kdpipe.cache.errors import CacheError
from kdpipe.cache.read.reader import TeacherCache, open_cache
from kdpipe.cache.store.location import Location, open_location
from kdpipe.pipelines.commands.options import ReportOptions
from kdpipe.pipelines.data.provenance import recorded_entry
from kdpipe.pipelines.report.cache_report import cache_page
from kdpipe.pipelines.report.found import find_objects
from kdpipe.pipelines.report.page import Section, check_out, render_page, write_figures, write_page
from kdpipe.pipelines.report.paper_figures import paper_section
from kdpipe.pipelines.report.training_figures import group_colors
from kdpipe.pipelines.report.training_report import training_facts, training_sections
from kdpipe.pipelines.report.trainings import Training, find_trainings, group_trainings

__all__ = ["REPORT", "report", "report_cache", "report_trainings"]

REPORT = "report.html"


def report_trainings(folder: Path, options: ReportOptions, store_options: dict[str, str], console: Console) -> Path:
    """Write the report of the trainings in a folder.

    Args:
        folder: A work directory of `train-student` or `train-teacher`, or a folder with several.
        options: How.
        store_options: Of the store that the cache is in.
        console: Where progress is shown.

    Returns:
        The page, or the folder of the figures.

    Raises:
        KdpipeError: There is no training, or the page cannot be written.
    """
    out = options.out or folder / REPORT
    if options.png is None:
        check_out(out)
    trainings = find_trainings(folder)
    groups = group_trainings(trainings)
    cache, notes = _teacher_cache(trainings, options.cache, store_options)
    found = find_objects(groups, cache, options, console)
    found.notes[:0] = notes
    found.known_teacher_ap = found.known_teacher_ap or _compared_teacher_ap(folder)
    sections = training_sections(groups, found)
    if not options.no_inference:
        sections.insert(-1, paper_section(groups, cache, group_colors(groups), options.img_dir, console))
    students = sorted({training.student for training in trainings})
    subtitle = f"{', '.join(students[:4])}{', ...' * (len(students) > 4)} · {folder.resolve()}"
    title = f"Training {folder.resolve().name}" if len(trainings) == 1 else f"Trainings in {folder.resolve().name}"
    return write_report(out, options.png, (title, subtitle), training_facts(groups, found), sections, console)


def write_report(
    out: Path,
    png: Path | None,
    titles: tuple[str, str],
    facts: list[tuple[str, str]],
    sections: list[Section],
    console: Console,
) -> Path:
    """Write a page, or its figures alone.

    Args:
        out: The page.
        png: Folder for the figures alone, in place of the page.
        titles: Title and subtitle.
        facts: What is said first.
        sections: Of the page.
        console: Told where it is.
    """
    if png is not None:
        figures = write_figures(png, sections)
        console.print(f"{len(figures)} figures: {png}", markup=False)
        return png
    write_page(out, render_page(*titles, facts, sections))
    console.print(f"Report: {out}", markup=False)
    return out


def _teacher_cache(
    trainings: list[Training], named: str | None, store_options: dict[str, str]
) -> tuple[TeacherCache | None, list[str]]:
    """The cache that students learned from; and why it cannot be read."""
    places = {str(each.options["cache"]) for each in trainings if each.options.get("cache")}
    if named is None and len(places) > 1:
        return None, [f"Students of {len(places)} caches: the teacher is shown where one is named (--cache)."]
    place = named or next(iter(places), None)
    if place is None:
        return None, []
    try:
        return open_cache(open_location(place, store_options), allow_partial=True), []
    except (CacheError, OSError) as error:
        if named is not None:
            raise
        return None, [f"The cache is not there: {error}"]


def _compared_teacher_ap(folder: Path) -> float | None:
    """The teacher's AP, as `kdpipe compare` knew it; None where it did not."""
    try:
        ap = recorded_entry(json.loads((folder / "compare.json").read_bytes()), "teacher", "ap")
    except (OSError, ValueError):
        return None
    return ap if isinstance(ap, float) else None


def report_cache(location: Location, options: ReportOptions, console: Console) -> Path:
    """Write the report of a cache, by default `NAME.report.html` in the current folder.

    Args:
        location: Of the cache; parts may be missing.
        options: How.
        console: Where progress is shown.
    """
    out = options.out or Path(f"{location.title.removesuffix('.zarr')}.{REPORT}")
    if options.png is None:
        check_out(out)
    facts, sections = cache_page(location, options, console)
    return write_report(out, options.png, (f"Cache {location.title}", location.name), facts, sections, console)


def is_cache(place: str) -> bool:
    """Whether a path or URL is a cache, and no folder of trainings."""
    return "://" in place or (Path(place) / "zarr.json").exists()


def report(place: str, store_options: dict[str, str], options: ReportOptions, console: Console) -> Path:
    """Write the report of a cache, or of the trainings in a folder.

    Args:
        place: Path or URL.
        store_options: Of the object store.
        options: How.
        console: Where progress is shown.
    """
    if is_cache(place):
        return report_cache(open_location(place, store_options), options, console)
    return report_trainings(Path(place), options, store_options, console)
