"""Where time goes, for gpu.py: clocks around functions of kdpipe, and torch's profiler around training steps."""

import importlib
import inspect
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mmengine.model import BaseModel
from torch.profiler import ProfilerActivity, profile

import kdpipe.cache

# Stage, where its function is, and whether the device is waited for before and behind it.
STAGES = (
    ("decode (thread)", "kdpipe.pipelines.teacher.parts:load_picture", False),
    ("resize (thread)", "kdpipe.pipelines.teacher.pixel_pipeline:PixelPipeline.network_input", False),
    ("wait for image", "kdpipe.pipelines.teacher.parts:ReadAhead._next", False),
    ("backbone, FPN", "kdpipe.pipelines.teacher.teacher:Teacher.pyramid_of_input", True),
    ("RPN", "kdpipe.pipelines.teacher.teacher:Teacher.proposals", True),
    ("box head", "kdpipe.pipelines.teacher.teacher:Teacher.box_outputs", True),
    ("record, rest", "kdpipe.pipelines.teacher.teacher:Teacher.record", True),
    ("select", "kdpipe.cache.write.encode:merge_unlikely", True),
    ("select", "kdpipe.cache.write.encode:choose_objects", True),
    ("quantise", "kdpipe.cache.write.encode:quantize_rows", True),
    ("quantise", "kdpipe.cache.write.encode:_QUANTIZE[int4]", True),
    ("quantise", "kdpipe.cache.write.encode:_QUANTIZE[int8]", True),
    ("to host", "kdpipe.cache.write.encode:_Host._copied", True),
    ("encode, rest", "kdpipe.cache.write.part_writer:start_encoding", True),
    ("wait, copy (thread)", "kdpipe.cache.write.encode:Encoding.wait", False),
    ("wait for writer", "kdpipe.cache.write.part_writer:PartWriter._put", False),
    ("compress (threads)", "kdpipe.cache.write.arrays:encode_chunk", False),
    ("wait, join shards (thread)", "kdpipe.cache.write.arrays:ArrayWriter._end_shard", False),
    ("of it hash, disk", "kdpipe.cache.format.zarr_arrays:WrittenFiles.set", False),
    ("commit (thread)", "kdpipe.cache.write.part_writer:PartWriter._commit", False),
    ("of it fsync", "kdpipe.cache.store.folder:_sync_tree", False),
    ("wait for commit", "kdpipe.pipelines.teacher.commit_thread:CommitThread.begin", False),
)
# The start of the names of kdpipe's files.
HERE = str(Path(kdpipe.cache.__file__).parents[1])


class Clocks:
    """Seconds of each stage; what another stage takes inside one is the other's."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.missing: list[str] = []
        self._wait = wait
        self._local = threading.local()

    @contextmanager
    def _stage(self, name: str, waits: bool) -> Iterator[None]:
        inner: list[float] = self._local.__dict__.setdefault("inner", [])
        inner.append(0.0)
        if waits:
            self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            if waits:
                self._wait()
            taken = time.perf_counter() - start
            self.seconds[name] += taken - inner.pop()
            if inner:
                inner[-1] += taken

    def around(self, name: str, call: Callable[..., Any], waits: bool) -> Callable[..., Any]:
        """The same function, timed."""
        if inspect.iscoroutinefunction(call):

            async def timed_later(*args: Any, **options: Any) -> Any:
                start = time.perf_counter()
                try:
                    return await call(*args, **options)
                finally:
                    self.seconds[name] += time.perf_counter() - start

            return timed_later

        def timed(*args: Any, **options: Any) -> Any:
            with self._stage(name, waits):
                return call(*args, **options)

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time all stages that there are; those of which the function has another name by now are `missing`."""
        with ExitStack() as stack:
            for name, place, waits in STAGES:
                module, _, path = place.partition(":")
                try:
                    owner: Any = importlib.import_module(module)
                    *outer, last = path.split(".")
                    for part in outer:
                        owner = getattr(owner, part)
                    if last.endswith("]"):
                        table, key = getattr(owner, last.partition("[")[0]), last.partition("[")[2][:-1]
                        stack.enter_context(patch.dict(table, {key: self.around(name, table[key], waits)}))
                    else:
                        timed = self.around(name, getattr(owner, last), waits)
                        stack.enter_context(patch.object(owner, last, timed))
                except (ImportError, AttributeError, KeyError):
                    self.missing.append(path)
            yield


@contextmanager
def profiled_steps(first: int, count: int, cuda: bool) -> Iterator[dict[str, Any]]:
    """Profile some training steps of a detector.

    Args:
        first: How many steps are made before.
        count: How many are profiled.
        cuda: Whether they run on a GPU.

    Yields:
        Filled when they have been made: `profile`; `seconds` by the clock; and `waits`, how often each line of code
        waited for the GPU in the step before.
    """
    done: dict[str, Any] = {}
    step, number = BaseModel.train_step, 0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    recorder = profile(activities=activities)

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal number
        if number == first - 1:
            with waits_told(done, cuda):
                result = step(self, *args, **options)
        else:
            if number == first:
                recorder.__enter__()
                done["start"] = _now(cuda)
            result = step(self, *args, **options)
        number += 1
        if number == first + count:
            done["seconds"] = _now(cuda) - done.pop("start")
            recorder.__exit__(None, None, None)
            done["profile"] = recorder
        return result

    with patch.object(BaseModel, "train_step", watched):
        yield done


@contextmanager
def waits_told(done: dict[str, Any], cuda: bool) -> Iterator[None]:
    """Count the lines of code that wait for the GPU."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    done["waits"] = Counter(f"{x.filename}:{x.lineno}" for x in told if "called a synchronizing" in str(x.message))


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def profile_cells(done: Mapping[str, Any], count: int, file: Path) -> dict[str, object]:
    """How busy the GPU is, and what makes it wait; the table of operators goes into a file."""
    recorder = done["profile"]
    totals = recorder.key_averages()
    calls: dict[str, int] = defaultdict(int)
    for entry in totals:
        calls[entry.key] += entry.count
    tables = []
    for order in ("self_cuda_time_total", "self_cpu_time_total"):
        try:
            tables.append(totals.table(sort_by=order, row_limit=30, max_name_column_width=80))
        except Exception as error:  # another torch has other names
            tables.append(f"{order}: {error}")
    waits = done.get("waits", Counter())
    lines = [f"{times:5} {place}" for place, times in waits.most_common()]
    file.write_text("\n".join(["Lines that waited for the GPU in one step:", *lines, "", *tables]))
    ours = sum(times for place, times in waits.items() if place.startswith(HERE))
    copies = sum(calls[name] for name in calls if name.startswith("Memcpy DtoH"))
    return {
        "s/step": done["seconds"] / count,
        "GPU busy, %": 100 * _busy(recorder.events()) / done["seconds"],
        "per step: aten::item": calls["aten::item"] / count,
        "nonzero": calls["aten::nonzero"] / count,
        "copies to host": copies / count,
        "lines that wait, times: kdpipe's": ours,
        "others'": sum(waits.values()) - ours,
        "stream waits": calls["cudaStreamSynchronize"] / count,
        "kernels": sum(calls[name] for name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel")) / count,
    }


def _busy(events: Any) -> float:
    """Seconds in which at least one kernel or copy was on the GPU."""
    spans = sorted(
        (event.time_range.start, event.time_range.end) for event in events if "CUDA" in str(event.device_type)
    )
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6
