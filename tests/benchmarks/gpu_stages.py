"""Where time goes, for gpu.py: clocks around functions of kdpipe, and torch's profiler around training steps."""

import functools
import importlib
import inspect
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
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
# Parts of a training step: clocks run in the stream of the GPU, which is not waited for.
PARTS = tuple(
    (name, place, False)
    for name, place in (
        ("to GPU", "kdpipe.distill.preprocessor:DistilledPreprocessor.forward"),
        ("student", "mmdet.models:TwoStageDetector.loss"),
        ("student", "mmdet.models:SingleStageDetector.loss"),
        ("student at RoIs", "kdpipe.distill.students.two_stage:TwoStageStage.outputs_at"),
        ("teacher pyramid", "kdpipe.distill.teacher.pyramids:TeacherPyramids.__init__"),
        ("teacher RoIAlign", "kdpipe.distill.teacher.pyramids:TeacherPyramids.roi_align"),
        ("teacher head", "kdpipe.distill.teacher.heads.fc:TeacherHead.of_features"),
        ("sgfi RoIAlign", "kdpipe.distill.pairs:roi_align_levels"),
        ("sgfi", "kdpipe.distill.losses.sgfi:SGFI.forward"),
        ("ckd", "kdpipe.distill.losses.ckd:CKD.forward"),
        ("pred, rest", "kdpipe.distill.detector:DistilledDetector.forward"),
        ("backward", "mmengine.optim:OptimWrapper.backward"),
        ("optimiser", "mmengine.optim:OptimWrapper.step"),
    )
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

        @functools.wraps(call)  # losses are given what the names of their parameters say
        def timed(*args: Any, **options: Any) -> Any:
            with self._stage(name, waits):
                return call(*args, **options)

        return timed

    @contextmanager
    def running(self, stages: Sequence[tuple[str, str, bool]] = STAGES) -> Iterator[None]:
        """Time all stages that there are; those of which the function has another name by now are `missing`."""
        with ExitStack() as stack:
            for name, place, waits in stages:
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


class StreamClocks(Clocks):
    """Milliseconds of each part in the stream of a GPU: what it computes, and what it waits meanwhile for Python.

    Args:
        cuda: Whether there is a GPU; otherwise the parts are timed by the clock.
    """

    def __init__(self, cuda: bool) -> None:
        super().__init__(lambda: None)
        self._cuda = cuda
        self._open: list[str] = []
        self._marks: list[tuple[str, Any]] = []  # from when on which part ran
        self._mark("outside")

    def _mark(self, part: str) -> None:
        at: Any = time.perf_counter()
        if self._cuda:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        self._marks.append((part, at))

    @contextmanager
    def _stage(self, name: str, waits: bool) -> Iterator[None]:
        self._open.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "outside")

    def milliseconds(self) -> dict[str, float]:
        """Of each part, since the last time; those of what it called are the others'."""
        self._mark("outside")
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for (part, start), (_, end) in pairwise(self._marks):
            totals[part] += start.elapsed_time(end) if self._cuda else 1000 * (end - start)
        del self._marks[:-1]
        return totals


@contextmanager
def profiled_steps(first: int, count: int, cuda: bool) -> Iterator[dict[str, Any]]:
    """Profile some training steps of a detector.

    Args:
        first: How many steps are made before.
        count: How many are timed; one more is profiled.
        cuda: Whether they run on a GPU.

    Yields:
        Filled when they have been made: `seconds` by the clock, and `parts`, milliseconds per step of each; `profile`
        of the kernels of the next step, `profiled` seconds; `waits`, how often each line of code waited for the GPU in
        the step before; and `missing` parts.
    """
    done: dict[str, Any] = {}
    step, number, clocks = BaseModel.train_step, 0, StreamClocks(cuda)
    recorder = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        if number == first:
            with waits_told(done, cuda):
                result = step(self, *args, **options)
            clocks.milliseconds()
            done["start"] = _now(cuda)
        elif number <= first + count:
            result = step(self, *args, **options)
            if number == first + count:
                done["parts"] = {part: ms / count for part, ms in clocks.milliseconds().items()}
                done["seconds"] = _now(cuda) - done.pop("start")
        elif number == first + count + 1:
            start = _now(cuda)
            with recorder:
                result = step(self, *args, **options)
                done["profiled"] = _now(cuda) - start
            done["profile"] = recorder
        else:
            result = step(self, *args, **options)
        return result

    with patch.object(BaseModel, "train_step", watched), clocks.running(PARTS):
        yield done
    done["missing"] = clocks.missing


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
    """Parts of a step, how busy the GPU is, and what makes it wait; the table of kernels goes into a file."""
    recorder = done["profile"]
    totals = recorder.key_averages()
    calls: dict[str, int] = defaultdict(int)
    for entry in totals:
        calls[entry.key] += entry.count
    try:
        table = totals.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=80)
    except Exception as error:  # another torch has other names
        table = str(error)
    waits = done.get("waits", Counter())
    lines = [f"{times:5} {place}" for place, times in waits.most_common()]
    file.write_text("\n".join(["Lines that waited for the GPU in one step:", *lines, "", table]))
    ours = sum(times for place, times in waits.items() if place.startswith(HERE))
    copies = sum(calls[name] for name in calls if name.startswith("Memcpy DtoH"))
    return {
        "s/step": done["seconds"] / count,
        "GPU busy, %": 100 * _busy(recorder.events()) / done["profiled"],
        **{f"{part}, ms": ms for part, ms in done["parts"].items()},
        "copies to host": copies,
        "lines that wait, times: kdpipe's": ours,
        "others'": sum(waits.values()) - ours,
        "stream waits": calls["cudaStreamSynchronize"],
        "kernels": sum(calls[name] for name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel")),
        **({"not found": ", ".join(done["missing"])} if done["missing"] else {}),
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
