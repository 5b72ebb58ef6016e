"""From the options of `compare` to its cells, each of which is a command line of `train-student`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from mmengine.config import Config
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.read.reader import TeacherCache, open_cache
from kdpipe.cache.store.location import open_location
from kdpipe.distill.methods import expand_methods
from kdpipe.pipelines.cli.options import fields_among
from kdpipe.pipelines.cli.student_options import DEFAULT_STUDENT, absolute_path, given_options
from kdpipe.pipelines.cli.training import method_names, train_student_command
from kdpipe.pipelines.compare.cells import PLAIN, Cell, Row, methods_folder
from kdpipe.pipelines.compare.grid import Arguments, GridRow, argument_words, merged
from kdpipe.pipelines.compare.teacher_ap import checkpoint_of
from kdpipe.pipelines.data.find import cached_source, val_source
from kdpipe.pipelines.data.options import DataOptions, ValOptions
from kdpipe.pipelines.detectors.configs import find_config
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.student_choices import choose_methods, choose_scale
from kdpipe.pipelines.training.teachers import CachedTrainingTeacher
from kdpipe.pipelines.training.training_record import config_digest

__all__ = ["RowBuilder"]


class RowBuilder:
    """Makes the rows of a comparison, whose cells are command lines of train-student.

    Args:
        given: Options on the command line, which have the last word.
        secret: Those of an object store.
        work_dir: Absolute.
        seed: The first.
        seeds: How many.

    Attributes:
        teacher_ckpt: Checkpoint of the only teacher; None where there are several, or it is not recorded.
    """

    def __init__(self, given: Arguments, secret: Arguments, work_dir: Path, seed: int, seeds: int) -> None:
        self._given, self._secret, self._work_dir = given, secret, work_dir
        self._seeds = range(seed, seed + seeds)
        self._caches: dict[tuple[str, bool], TeacherCache] = {}
        self._teachers: set[Path | None] = set()
        self._measured: list[tuple[str, TeacherCache, click.Context]] = []

    @property
    def teacher_ckpt(self) -> Path | None:
        return next(iter(self._teachers)) if len(self._teachers) == 1 else None

    def rows(self, row: GridRow) -> list[Row]:
        """The `Row` of each choice of methods."""
        arguments = merged({"--student": [DEFAULT_STUDENT]}, row.arguments, self._given)
        context = self._parsed(row.name, argument_words(merged(arguments, self._secret)))
        config = find_config(context.params["student"])
        cache = self._cache(context)
        teacher = None if cache is None else CachedTrainingTeacher(cache)
        methods = list(dict.fromkeys(self._methods(row, config, context, teacher)))
        arguments, digest = self._absolute(arguments), config_digest(config)
        record = None if teacher is None else teacher.record
        scale = context.params["scale"]
        if teacher is not None:
            self._measured.append((row.name, teacher.cache, context))
            training = TrainingOptions(**fields_among(TrainingOptions, context.params))
            scale = choose_scale(training, config, teacher, Console(quiet=True))
        found = []
        for each in methods:
            folder = self._work_dir / row.name / methods_folder(each)
            with_methods = merged(arguments, {"--methods": [each]})
            cells = [
                self._cell(row.name, with_methods, folder / f"seed-{seed}", seed, digest, record)
                for seed in self._seeds
            ]
            found.append(Row(row.name, each, str(context.params["student"]), cells, scale, row.baseline))
        if row.baseline is not None and any(each.methods == PLAIN for each in found):
            raise click.UsageError(f"Row {row.name} has no distillation (methods none), and names a baseline.")
        return found

    def _cell(
        self,
        name: str,
        arguments: Arguments,
        folder: Path,
        seed: int,
        digest: str,
        teacher: dict[str, Any] | None,
    ) -> Cell:
        places = {"--seed": [str(seed)], "--work-dir": [str(folder)], "--auto-resume": [], "--no-report": []}
        words, secret = argument_words(merged(arguments, places)), argument_words(self._secret)
        options = given_options(self._parsed(name, [*words, *secret]))
        command = {"config": digest, "options": options}
        return Cell(seed, folder, ("train-student", *words), command, teacher, tuple(secret))

    def check_validation(self) -> None:
        """Refuse trainings from a cache that would not be measured: there is nothing to compare then.

        Raises:
            KdpipeError: There are no validation images; or the training images are not where they are said to be.
        """
        for name, cache, context in self._measured:
            source = cached_source(cache, DataOptions(**fields_among(DataOptions, context.params)))
            if val_source(source, ValOptions(**fields_among(ValOptions, context.params))) is None:
                raise KdpipeError(
                    f"{name}: there are no validation images, so that AP would not be measured. Name them with "
                    "--val-ann-file and --val-img-dir (or --val-split, --val-bdd)."
                )

    def _parsed(self, name: str, words: list[str]) -> click.Context:
        """The options of a training, as train-student understands them.

        Raises:
            UsageError: It does not.
        """
        try:
            return train_student_command.make_context("train-student", words)
        except click.UsageError as error:
            raise click.UsageError(f"student {name}: {error.format_message()}") from error

    def _cache(self, context: click.Context) -> TeacherCache | None:
        """The cache of a training, opened once; None for one beside its teacher."""
        options = context.params
        if (options["cache"] is None) == (options["teacher_ckpt"] is None):
            raise click.UsageError("compare needs either --cache or --teacher-ckpt, for all or for each row of a grid.")
        if options["cache"] is None:
            self._teachers.add(options["teacher_ckpt"])
            return None
        key = options["cache"], options["allow_partial"]
        if key not in self._caches:
            location = open_location(options["cache"], options["store_options"])
            self._caches[key] = open_cache(location, allow_partial=options["allow_partial"])
        self._teachers.add(checkpoint_of(self._caches[key]))
        return self._caches[key]

    @staticmethod
    def _methods(
        row: GridRow, config: Config, context: click.Context, teacher: CachedTrainingTeacher | None
    ) -> list[str]:
        """`--methods` of each training, in one spelling."""
        names = []
        for each in row.methods or (PLAIN, "default"):
            chosen: Sequence[str] | None = method_names(each)
            if chosen is None:
                if teacher is None:
                    raise click.UsageError(
                        f"student {row.name}: name its methods; the default ones follow the teacher of a cache only."
                    )
                chosen = choose_methods(None, config, context.params["overrides"], teacher, Console(quiet=True))
            expand_methods(chosen, "roi_head" not in config.model)  # refused before anything is trained
            names.append(",".join(chosen) or PLAIN)
        return names

    @staticmethod
    def _absolute(arguments: Arguments) -> Arguments:
        """Options with absolute paths, so that their command line is right in any folder."""
        options = {word: option for option in train_student_command.params for word in option.opts}
        return {word: [absolute_path(options[word], text) for text in values] for word, values in arguments.items()}
