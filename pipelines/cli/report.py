"""The command that shows trainings and caches to people: `report`."""

from pathlib import Path

import click

from kdpipe.pipelines.cli.options import PATH, PLACE, grouped, store_option
from kdpipe.pipelines.commands.options import ReportOptions
from kdpipe.pipelines.runtime.console import command_console, error_text

__all__ = ["report_command", "report_trainings_in"]


@click.command("report")
@click.argument("place", metavar="FOLDER|CACHE", type=PLACE)
@store_option
@click.option("--out", type=PATH, help="The page. Default: FOLDER/report.html, or NAME.report.html for a cache.")
@click.option("--png", type=PATH, help="Folder for the figures alone, as PNG, in place of the page.")
@click.option("--cache", help="The cache that the students learned from. Default: the one that their trainings record.")
@click.option("--teacher-ckpt", type=PATH, help="The teacher's checkpoint. Default: the one that the cache records.")
@click.option("--img-dir", type=PATH, help="Where the validation images moved; of a cache, its images.")
@click.option("--no-inference", is_flag=True, help="Run no detector: show what is kept.")
@grouped("options", ReportOptions)
def report_command(place: str, store_options: dict[str, str], options: ReportOptions) -> None:
    """Write a page with pictures, in one HTML file: of the trainings in a folder, or of a cache.

    FOLDER is the work directory of train-student or train-teacher, or a folder that holds several.
    Detections of students that were not kept, and those of the teacher, are made once, and kept in the work directory.
    """
    from kdpipe.pipelines.report.report import report

    report(place, store_options, options, command_console(shared=False))


def report_trainings_in(folder: Path) -> None:
    """Write the report of trainings that have just ended, from what they kept; what goes wrong is said, no more.

    Args:
        folder: Of a training, or of several.
    """
    from kdpipe.pipelines.report.report import report_trainings

    console = command_console()
    try:
        report_trainings(folder, ReportOptions(no_inference=True), {}, console)
    except Exception as error:  # of drawing, which is no reason for trainings to fail
        console.print(f"No report was written: {error_text(error) or type(error).__name__}", markup=False)
