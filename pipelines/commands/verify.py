"""`kdpipe verify`: is a cache complete and as it was written, and does it say what its teacher says?"""

import shlex
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from kdpipe.cache.errors import CacheError
from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.read.root import read_root
from kdpipe.cache.store.location import Location
from kdpipe.cache.verify.fault import Fault
from kdpipe.cache.verify.verification import Verification, remove_faults, verify_cache
from kdpipe.pipelines.commands.cache_command import cache_command
from kdpipe.pipelines.commands.options import TeacherCheckOptions
from kdpipe.pipelines.runtime.console import ProgressBar, bytes_text, plain

__all__ = ["check_ckpt", "verify_files", "verify_teacher"]

_SHOWN_IDS = 10


def verify_files(location: Location, *, repair: bool, console: Console) -> bool:
    """Check all files of a cache, print what is wrong, a line each, and remove it where that is asked for.

    Args:
        location: Of the cache.
        repair: Remove parts that are bad, a bad head, and what processes that ended left behind.
        console: Where all is shown.

    Returns:
        Whether the cache is good now: complete, and without a fault.

    Raises:
        CacheError: there is no cache there, or its root is damaged.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        bars: list[ProgressBar] = []

        def progress(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(ProgressBar(console, "verify MiB", total >> 20)))
            bars[0].update(done >> 20, f"{bytes_text(done / (time.perf_counter() - start))}/s")

        try:
            verification = verify_cache(location, progress)
        except CacheError as error:
            if repair:
                raise CacheError(
                    f"{error}\nWhat is wrong with the root of a cache, --repair cannot put right."
                ) from error
            raise
    for fault in verification.faults:
        console.print(_line(fault), markup=False)
    for note in verification.notes:
        console.print(f"note: {plain(note)}", markup=False)
    _summary(location, verification, time.perf_counter() - start, console)
    faults = verification.faults
    if repair and faults:
        removed = remove_faults(location, verification)
        for place in removed:
            console.print(f"removed {plain(location)}/{plain(place)}", markup=False)
        faults = tuple(fault for fault in faults if not fault.is_stray)
    _advise(location, verification, faults, repair, console)
    return not faults


def _line(fault: Fault) -> str:
    ids = ", ".join(map(str, fault.image_ids[:_SHOWN_IDS]))
    more = f" and {len(fault.image_ids) - _SHOWN_IDS} more" if len(fault.image_ids) > _SHOWN_IDS else ""
    images = f" (image{'s' * (len(fault.image_ids) > 1)} {ids}{more})" if fault.image_ids else ""
    return plain(f"{fault.where}: {fault.message}{images}")


def _summary(location: Location, verification: Verification, seconds: float, console: Console) -> None:
    bad = len(verification.bad_parts)
    parts = f"{verification.parts} part{'s' * (verification.parts > 1)}" + (
        f", of which {bad} are bad or missing" if bad else ""
    )
    read = f"{bytes_text(verification.bytes_read)} read in {seconds:.1f} s"
    count = len(verification.faults)
    faults = "no faults" if not count else f"{count} fault{'s' * (count > 1)}"
    skipped = f" ({verification.skipped} skipped)" if verification.skipped else ""
    console.print(f"{plain(location)}: {verification.images} images{skipped}, {parts}, {read}: {faults}", markup=False)


def _advise(
    location: Location, verification: Verification, faults: tuple[Fault, ...], repaired: bool, console: Console
) -> None:
    """What to do now."""
    if not faults:
        return
    if any(not fault.repairable and fault.where == "the root" for fault in faults):
        console.print(
            f"The root of a cache cannot be repaired: restore it, or move {plain(location)} away and cache the teacher "
            "again.",
            markup=False,
        )
    if not any(fault.repairable for fault in faults):
        return
    if not repaired and any(fault.remove is not None for fault in faults):
        console.print(
            f"Run `kdpipe verify {plain(location)} --repair`, then `kdpipe cache-teacher` with the same options.",
            markup=False,
        )
        return
    command = cache_command(open_cache(location, allow_partial=True), read_root(location).plan["part_size"])
    if command is None:
        console.print("What is missing is made by the program that made the cache.")
        return
    console.print(
        f"What is missing is made by `kdpipe cache-teacher` with the same options (and --config where it was given):\n"
        f"{plain(shlex.join(command))}",
        markup=False,
    )


def check_ckpt(ckpt: Path, config: str | None, *, trust: bool) -> None:
    """Refuse what cannot be read of a teacher before all of a cache is read; `verify_teacher` compares the two.

    Args:
        ckpt: The teacher's checkpoint.
        config: Its config, if one is named.
        trust: Unpickle the checkpoint even where it holds more than weights.

    Raises:
        KdpipeError: One of these is not there, or cannot be read.
    """
    from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
    from kdpipe.pipelines.detectors.configs import find_config

    load_checkpoint(ckpt, trust=trust)
    if config is not None:
        find_config(config)


def verify_teacher(location: Location, options: TeacherCheckOptions, console: Console) -> bool:
    """Compare a sound cache with its live teacher, and compute the teacher's AP from the cache; print both.

    Args:
        location: Of the cache.
        options: What is compared, and with what.
        console: Where all is shown.

    Returns:
        Whether the cache says what the teacher says, as far as its storage types can.

    Raises:
        KdpipeError: another teacher or data set than those of the cache, or they cannot be read.
    """
    from kdpipe.pipelines.commands.evaluate import metrics_tables
    from kdpipe.pipelines.data.provenance import recorded_config, recorded_data
    from kdpipe.pipelines.data.report import report_data
    from kdpipe.pipelines.runtime.devices import torch_device
    from kdpipe.pipelines.teacher.compare import compare_with_teacher, errors_table, load_recorded_teacher, unexplained
    from kdpipe.pipelines.teacher.decode import cached_ap

    cache, teacher = open_cache(location), None
    if options.ckpt is not None:
        device = torch_device(options.device)
        teacher = load_recorded_teacher(cache, options.ckpt, config=options.config, device=device, trust=options.trust)
    data = recorded_data(cache, options.data)
    report_data(data, console, trained=False, strict=options.strict_data)
    wrong: list[str] = []
    if teacher is not None:
        errors = compare_with_teacher(cache, teacher, data, options.sample, console)
        console.print(errors_table(errors))
        wrong = unexplained(errors)
        for line in wrong:
            console.print(line, markup=False)
    if options.ap:
        console.print("The teacher's AP, from the cache alone:")
        config = recorded_config(cache, options.config, trust=options.trust)
        for table in metrics_tables(cached_ap(cache, config, data, console)):
            console.print(table)
    return not wrong
