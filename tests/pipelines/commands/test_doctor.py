"""The diagnosis of made-up environments, and of this one."""

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from kdpipe.pipelines.commands.doctor import Check, Environment, diagnose, inspect_environment, run_doctor

pytestmark = pytest.mark.filterwarnings(
    "ignore:``MultiScaleDeformableAttention`` has been moved:ImportWarning"  # mmdet's old import path
)

VERSIONS = {
    "kdpipe": "0.1.0",
    "torch": "2.14.1+cpu",
    "torchvision": "0.29.1+cpu",
    "mmdet": "3.3.0",
    "mmcv-lite": "2.1.0",
    "numcodecs": "0.16.5",
}
HEALTHY = Environment(
    python="3.11.9",
    requirements=("torch>=2.6", "torchvision>=0.21", "mmdet==3.3.0", "mmcv-lite==2.1.0", "numcodecs>=0.15"),
    versions=VERSIONS,
    failures={},
    ops="bridged",
    ops_error="",
    asked=("nms", "nms_rotated", "roi_align_forward"),
    bridged=("nms", "roi_align_forward"),
    cores=2,
    memory=8 << 30,
    gpus=(),
    has_nvidia_driver=False,
    shared_memory=64 << 20,
)


def problems(**changes: Any) -> list[Check]:
    return [c for c in diagnose(dataclasses.replace(HEALTHY, **changes)) if c.status == "problem"]


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in VERSIONS.items() if key != name}


def printed(environment: Environment | None = None) -> tuple[int, str]:
    stream = io.StringIO()
    code = run_doctor(Console(file=stream, width=200), environment)
    return code, stream.getvalue()


def test_nothing_is_wrong_with_a_healthy_environment() -> None:
    assert problems() == []
    code, text = printed(HEALTHY)
    assert code == 0
    assert "Nothing is wrong." in text
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines() if line.strip()}
    assert rows["bridged"].strip() == "nms, roi_align"
    assert rows["unavailable"].strip() == "nms_rotated"


def test_compiled_ops_are_native() -> None:
    versions = {**without("mmcv-lite"), "mmcv": "2.1.0"}
    environment = dataclasses.replace(HEALTHY, versions=versions, ops="native")
    code, text = printed(environment)
    assert code == 0
    assert "native" in text
    assert "unavailable" not in text


@pytest.mark.parametrize(
    ("changes", "name", "text", "remedy"),
    [
        ({"versions": without("numcodecs")}, "numcodecs", "missing", "pip install 'numcodecs>=0.15'"),
        ({"versions": without("kdpipe")}, "kdpipe", "not installed", "pip install"),
        ({"versions": {**VERSIONS, "torch": "2.1.0"}}, "torch", "2.1.0, needed >=2.6", "pip install 'torch>=2.6'"),
        ({"versions": without("mmcv-lite")}, "mmcv", "missing", "mmcv-lite==2.1.0"),
        ({"versions": {**VERSIONS, "mmcv-lite": "2.2.0"}}, "mmcv", "mmdet 3.3.0 takes", "mmcv-lite==2.1.0"),
        ({"versions": {**VERSIONS, "mmcv": "2.2.0"}}, "mmcv", "mmcv 2.2.0 and mmcv-lite 2.1.0", "uninstall"),
        (
            {"versions": {**VERSIONS, "mmcv": "2.0.1"}, "ops": "native"},
            "mmcv",
            "mmcv 2.0.1 and mmcv-lite 2.1.0 in one folder: one has overwritten",
            "pip uninstall -y mmcv-lite && pip install --force-reinstall --no-deps mmcv==2.0.1",
        ),
        (
            {"ops": "broken", "ops_error": "undefined symbol: _ZN3c10"},
            "mmcv ops",
            "do not load (undefined symbol: _ZN3c10)",
            "mmcv-lite==2.1.0",
        ),
        (
            {"failures": {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}},
            "import torchvision",
            "operator torchvision::nms does not exist",
            "torch and torchvision of one release together",
        ),
        ({"failures": {"mmdet": "AssertionError: no"}}, "import mmdet", "AssertionError: no", "mmdet"),
        ({"shared_memory": None}, "/dev/shm", "missing", "--shm-size"),
        ({"has_nvidia_driver": True}, "CUDA", "torch finds no device", "pytorch.org"),
    ],
)
def test_each_problem_has_a_remedy(changes: dict[str, Any], name: str, text: str, remedy: str) -> None:
    (problem,) = problems(**changes)
    assert problem.name == name
    assert text in problem.found
    assert remedy in problem.remedy
    code, text = printed(dataclasses.replace(HEALTHY, **changes))
    assert code == 1
    assert problem.remedy in text


def test_two_mmcv_of_one_version_are_seen() -> None:
    environment = dataclasses.replace(HEALTHY, versions={**VERSIONS, "mmcv": "2.1.0"}, ops="native")
    (check,) = (check for check in diagnose(environment) if check.name == "mmcv")
    assert (check.status, check.found) == ("note", "mmcv 2.1.0 and mmcv-lite 2.1.0 in one folder, alike")
    assert printed(environment)[0] == 0


def test_a_missing_package_is_reported_once() -> None:
    changes = {
        "versions": without("numcodecs"),
        "failures": {"numcodecs": "ModuleNotFoundError: No module named 'numcodecs'"},
    }
    assert [p.name for p in problems(**changes)] == ["numcodecs"]


def test_what_one_broken_package_drags_down_is_reported_once() -> None:
    error = "OSError: libcudart.so.12: cannot open shared object file"
    (problem,) = problems(failures={"torch": error, "torchvision": error, "mmcv": error}, ops=None)
    assert problem.name == "import torch"
    assert problem.found == error


def test_devices_are_listed() -> None:
    findings = {c.name: c.found for c in diagnose(dataclasses.replace(HEALTHY, gpus=(("H100 [PCIe]", 80 << 30),)))}
    assert "2 cores" in findings["CPU"]
    assert "H100 [PCIe]" in findings["cuda:0"]
    assert "H100 [PCIe]" in printed(dataclasses.replace(HEALTHY, gpus=(("H100 [PCIe]", 80 << 30),)))[1]


def test_this_environment_is_fine() -> None:
    environment = inspect_environment()
    assert environment.failures == {}
    assert {"torch", "mmdet", "zarr", "numcodecs", "pycocotools", "kdpipe"} <= set(environment.versions)
    assert {"nms", "roi_align_forward", "box_iou_rotated", "ms_deform_attn_forward"} <= set(environment.asked)
    assert set(environment.bridged) <= set(environment.asked)
    assert environment.ops == "bridged" or "mmcv" in environment.versions
    code, text = printed(environment)
    assert code == (1 if any(c.status == "problem" for c in diagnose(environment)) else 0)
    assert "mmcv ops" in text
