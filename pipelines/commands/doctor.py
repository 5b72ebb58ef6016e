"""`kdpipe doctor`: what is installed, what it runs on, whose ops mmcv runs, and what is wrong with a remedy each."""

import importlib
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdpipe.pipelines.mmcv_ops.bridge import extension_names, extension_state
from kdpipe.pipelines.runtime.console import bytes_text
from kdpipe.pipelines.runtime.machine import cores, shared_memory

__all__ = ["Check", "Environment", "diagnose", "inspect_environment", "run_doctor"]

MMCV_FOR_MMDET = SpecifierSet(">=2.0.0rc4,<2.2")  # what mmdet 3.3.0 accepts
BRIDGE_REMEDY = "pip uninstall -y mmcv mmcv-lite && pip install mmcv-lite==2.1.0"
KEEP_REMEDY = "pip uninstall -y mmcv-lite && pip install --force-reinstall --no-deps mmcv=={}"
IMPORTED = ("torch", "torchvision", "mmengine", "mmcv", "mmcv.ops", "mmdet", "zarr", "pycocotools.cocoeval")
Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, what was found, and for a problem what to do."""

    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Environment:
    """Everything that the diagnosis depends on.

    Args:
        python: Version of the interpreter.
        requirements: What kdpipe needs, as in its package metadata; empty where kdpipe is not installed.
        versions: Installed version of each distribution, without those that are missing.
        failures: Module that does not import -> the error.
        ops: Whose ops mmcv runs, None without a mmcv that imports; `ops_error` says why compiled ones do not load.
        asked: Compiled functions that mmcv asks for; `bridged` are those that kdpipe brings.
        cores, memory: Cores that this process may use; bytes of this machine, 0 where unknown.
        gpus: (name, bytes of memory) of each CUDA device that torch can use.
        shared_memory: Bytes of /dev/shm, None where there is none.
        has_nvidia_driver: Whether there is a driver, usable by torch or not.
    """

    python: str
    requirements: tuple[str, ...]
    versions: Mapping[str, str]
    failures: Mapping[str, str]
    ops: Literal["native", "bridged", "broken"] | None
    ops_error: str
    asked: tuple[str, ...]
    bridged: tuple[str, ...]
    cores: int
    memory: int
    gpus: tuple[tuple[str, int], ...]
    has_nvidia_driver: bool
    shared_memory: int | None


def inspect_environment() -> Environment:
    """Look at this interpreter and this machine. Imports torch and mmdet."""
    try:
        needed = tuple(r for r in requires("kdpipe") or () if "extra ==" not in r)
    except PackageNotFoundError:
        needed = ()
    failures = _import_failures(IMPORTED)
    ops, error = extension_state() if "mmcv" not in failures else (None, "")
    return Environment(
        python=platform.python_version(),
        requirements=needed,
        versions=_versions([*(Requirement(r).name for r in needed), "kdpipe", "mmcv", "mmcv-lite"]),
        failures=failures,
        ops=ops,
        ops_error=error,
        asked=extension_names(),
        bridged=() if {"torch", "torchvision"} & set(failures) else _bridged(),
        cores=cores(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        gpus=() if "torch" in failures else _gpus(),
        has_nvidia_driver=Path("/proc/driver/nvidia/version").exists(),
        shared_memory=shared_memory(),
    )


def _versions(names: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _import_failures(modules: Iterable[str]) -> dict[str, str]:
    failures = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises is what is to be reported
            failures[module] = f"{type(error).__name__}: {error}"
    return failures


def _bridged() -> tuple[str, ...]:
    from kdpipe.pipelines.mmcv_ops.table import BRIDGED

    return tuple(BRIDGED)


def _gpus() -> tuple[tuple[str, int], ...]:
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple((p.name, p.total_memory) for p in properties)


def diagnose(environment: Environment) -> list[Check]:
    """The report on `environment`, in the order in which to read it. Pure."""
    return [
        *_check_packages(environment),
        *_check_mmcv(environment),
        *_check_imports(environment),
        *_check_devices(environment),
    ]


def _check_packages(environment: Environment) -> list[Check]:
    checks = [Check("python", "ok", environment.python)]
    if "kdpipe" in environment.versions:
        checks.append(Check("kdpipe", "ok", environment.versions["kdpipe"]))
    else:
        checks.append(Check("kdpipe", "problem", "not installed", "pip install -e . in kdpipe's folder"))
    for requirement in map(Requirement, environment.requirements):
        if requirement.name in ("mmcv", "mmcv-lite"):
            continue  # either will do: see _check_mmcv
        installed = environment.versions.get(requirement.name)
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        if installed is None:
            checks.append(Check(requirement.name, "problem", "missing", remedy))
        elif not requirement.specifier.contains(installed, prereleases=True):
            checks.append(Check(requirement.name, "problem", f"{installed}, needed {requirement.specifier}", remedy))
        else:
            checks.append(Check(requirement.name, "ok", installed))
    return checks


def _check_mmcv(environment: Environment) -> list[Check]:
    installed = {name: environment.versions[name] for name in ("mmcv", "mmcv-lite") if name in environment.versions}
    if not installed:
        return [Check("mmcv", "problem", "missing", "pip install mmcv-lite==2.1.0")]
    packages = " and ".join(f"{name} {number}" for name, number in installed.items())
    if not all(MMCV_FOR_MMDET.contains(number, prereleases=True) for number in installed.values()):
        checks = [Check("mmcv", "problem", f"{packages}, but mmdet 3.3.0 takes {MMCV_FOR_MMDET} only", BRIDGE_REMEDY)]
    elif len(installed) > 1:  # both own the folder mmcv
        remedy = f"to keep the compiled one: {KEEP_REMEDY.format(installed['mmcv'])}; for kdpipe's ops: {BRIDGE_REMEDY}"
        status: Status = "problem" if len(set(installed.values())) > 1 else "note"
        packages += " in one folder: one has overwritten the other" if status == "problem" else " in one folder, alike"
        checks = [Check("mmcv", status, packages, remedy)]
    else:
        checks = [Check("mmcv", "ok", packages)]
    if environment.ops == "broken":
        ops = f"compiled, but they do not load ({environment.ops_error}); kdpipe's own are used in their place"
        checks.append(Check("mmcv ops", "problem", ops, BRIDGE_REMEDY))
    elif environment.ops is not None:
        ops = "compiled" if environment.ops == "native" else "by kdpipe (no compiled mmcv)"
        checks.append(Check("mmcv ops", "ok", ops))
    return checks


def _check_imports(environment: Environment) -> list[Check]:
    """A module that does not import though it is installed; what it drags down with it is not a finding of its own."""
    checks: list[Check] = []
    for module, error in environment.failures.items():
        package = module.partition(".")[0]
        missing = not {package, f"{package}-lite"} & set(environment.versions)  # and reported as that
        if missing or any(check.found == error for check in checks):
            continue
        remedy = f"pip install --force-reinstall --no-deps {package}"
        if package in ("torch", "torchvision"):
            remedy = "install torch and torchvision of one release together: pip install --upgrade torch torchvision"
        elif package == "mmcv":
            remedy = BRIDGE_REMEDY
        checks.append(Check(f"import {module}", "problem", error, remedy))
    return checks


def _check_devices(environment: Environment) -> list[Check]:
    memory = f", {bytes_text(environment.memory)} of memory" if environment.memory else ""
    checks = [Check("CPU", "ok", f"{environment.cores} cores{memory}")]
    if environment.shared_memory is not None:
        checks.append(Check("/dev/shm", "ok", f"{bytes_text(environment.shared_memory)} of shared memory"))
    else:
        remedy = "mount one (docker run --shm-size 1g), or train with --workers 0"
        checks.append(Check("/dev/shm", "problem", "missing: loader workers cannot be started", remedy))
    for index, (name, size) in enumerate(environment.gpus):
        checks.append(Check(f"cuda:{index}", "ok", f"{name}, {bytes_text(size)}"))
    if not environment.gpus:
        if environment.has_nvidia_driver:
            remedy = "install a build of torch for CUDA that fits the driver: https://pytorch.org/get-started/locally/"
            checks.append(Check("CUDA", "problem", "there is an NVIDIA driver, but torch finds no device", remedy))
        else:
            checks.append(Check("CUDA", "note", "no device; everything runs on the CPU"))
    return checks


def run_doctor(console: Console, environment: Environment | None = None) -> int:
    """Print the report; 0 when nothing is wrong, 1 when there are problems.

    Args:
        console: Where to.
        environment: What to report on; this interpreter and machine where it is None.
    """
    environment = environment or inspect_environment()
    checks = diagnose(environment)
    table = Table(box=None, show_header=False, pad_edge=False)
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    for check in checks:
        table.add_row(Text(check.status, styles[check.status]), Text(check.name), Text(check.found))
    console.print(table)
    _print_ops(console, environment)
    problems = [check for check in checks if check.status == "problem"]
    for check in problems:
        console.print(Text.assemble((f"{check.name}: ", "bold red"), check.found), soft_wrap=True)
        console.print(Text(f"  {check.remedy}"), soft_wrap=True)
    if not problems:
        console.print("Nothing is wrong.")
    return 1 if problems else 0


def _print_ops(console: Console, environment: Environment) -> None:
    brought = environment.asked if environment.ops == "native" else environment.bridged
    groups = {
        "native" if environment.ops == "native" else "bridged": [n for n in environment.asked if n in brought],
        "unavailable": [n for n in environment.asked if n not in brought],
    }
    table = Table(box=None, show_header=False, pad_edge=False, title="mmcv's ops", title_justify="left")
    for state, names in groups.items():
        ops = sorted({re.sub(r"_(forward|backward)(_\w+)?$", "", name) for name in names})
        if ops:
            table.add_row(Text(state), Text(", ".join(ops)))
    if environment.asked:
        console.print(table)
