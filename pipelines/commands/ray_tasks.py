"""What `kdpipe cache-teacher --ray` runs on the machines of a cluster: options go in and counts come out, as JSON.

Nothing heavy is imported here: a node that cannot take part is to say why.
"""

import functools
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.store.location import open_location
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.runtime.memory import LESS_FOR_A_CACHE, memory_advice
from kdpipe.pipelines.runtime.ray_cluster import version_faults
from kdpipe.pipelines.teacher.options import CacheOptions

if TYPE_CHECKING:
    from kdpipe.pipelines.teacher.parts import PartMaker

__all__ = ["PartJob", "make_part", "node_faults"]


@dataclass(frozen=True)
class PartJob:
    """From what the parts of a cache are made, on any machine: all paths are absolute.

    Attributes:
        ckpt: The teacher's checkpoint.
        config: Its config, as `--config` names it.
        trust: Whether checkpoint and config may run code.
        data: Images and annotations.
        limit: Only the first so many images.
        val: Annotation file and image folder of the validation images, for the record.
        out: Address of the cache, whose root is there.
        store_options: Of its object store.
        options: What is kept.
        device: Where the teacher runs; None takes the GPU that Ray gives, or the CPU.
    """

    ckpt: Path
    config: str | None
    trust: bool
    data: DataOptions
    limit: int | None
    val: tuple[Path, Path] | None
    out: str
    store_options: dict[str, str]
    options: CacheOptions
    device: str | None

    def to_json(self) -> str:
        """The job as text."""
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def from_json(cls, text: str) -> "PartJob":
        """The job of a text that `to_json` gave."""
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))


def node_faults(text: str, versions: dict[str, str]) -> list[str]:
    """Why this machine cannot make parts; empty where it can.

    Args:
        text: Of the job.
        versions: As `own_versions` gives them where the run was started.
    """
    job = PartJob.from_json(text)
    faults = version_faults(versions)
    config = Path(job.config) if job.config is not None and Path(job.config).is_absolute() else None
    for path in (job.ckpt, config, job.data.ann_file, job.data.bdd, job.data.voc, job.data.img_dir):
        if path is not None and not path.exists():
            faults.append(f"{path} is not there")
    try:
        location = open_location(job.out, job.store_options)
        with location.explained("Reading the cache"):
            if location.is_absent():
                faults.append(f"the cache {location} is not there")
    except KdpipeError as error:
        faults.append(str(error))
    return faults


def make_part(text: str, index: int) -> dict[str, Any]:
    """Make one part, if nobody else has made it.

    Args:
        text: Of the job.
        index: Of the part.

    Returns:
        `images` and `bytes` that were added, and `lines` to print; or `error`, which is the user's or the machine's.
    """
    from kdpipe.pipelines.runtime.console import error_text

    lines: list[str] = []
    images = size = 0

    def show(new: int, raw: int) -> None:
        nonlocal images, size
        images, size = images + new, size + raw

    try:
        with memory_advice(LESS_FOR_A_CACHE):
            maker = _part_maker(text)
    except (KdpipeError, OSError) as error:
        return {"error": f"On the node {socket.gethostname()}: {error_text(error)}"}
    try:
        if maker.writer.pending([index]):
            with memory_advice(LESS_FOR_A_CACHE), maker.reader() as reader:
                maker.fill(index, reader, lines.append, show).close()
    except (KdpipeError, OSError) as error:
        return {"error": error_text(error)}
    return {"images": images, "bytes": size, "lines": lines}


@functools.cache
def _part_maker(text: str) -> "PartMaker":
    """The teacher of a job, loaded once per process."""
    from rich.console import Console

    from kdpipe.pipelines.commands.cache_teacher import prepare_parts
    from kdpipe.pipelines.data.find import DataSource
    from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
    from kdpipe.pipelines.runtime.devices import torch_device
    from kdpipe.pipelines.teacher.teacher import teacher_config

    job = PartJob.from_json(text)
    checkpoint = load_checkpoint(job.ckpt, trust=job.trust)
    return prepare_parts(
        checkpoint,
        teacher_config(checkpoint, job.config),
        DataSource(job.data, job.limit, job.val),
        open_location(job.out, job.store_options),
        job.options,
        device=torch_device(job.device),
        console=Console(quiet=True),
        config=job.config,
        is_prepared=True,
    )
