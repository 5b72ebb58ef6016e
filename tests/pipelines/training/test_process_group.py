"""Processes that train together: how they find each other, and what the user is told where they cannot go on."""

import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime.launch import LaunchError
from kdpipe.pipelines.training.process_group import lost_others, set_rendezvous

if TYPE_CHECKING:
    from tests.conftest import Forked, Forks

TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
STEP["SLURM_NODELIST"] = "127.0.0.7"
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# A training in miniature: steps in which each process waits for the others.
TRAINING = """
import sys, time, torch
from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.cli.main import cli, main
from kdpipe.pipelines.runtime.console import stop
from kdpipe.pipelines.training.process_group import join_process_group, trained_together

@cli.command("steps")
@trained_together
def steps():
    join_process_group({"backend": "nccl", "timeout": 30})
    stop.between_steps = True
    for step in range(int(sys.argv[1])):
        stop.check()
        torch.distributed.all_reduce(torch.ones(1))
        if step == 5:
            print("going", flush=True)
            if sys.argv[2:] == [str(torch.distributed.get_rank())]:
                raise KdpipeError("the picture 7 is bad")
        time.sleep(0.002)

main(["steps"])
"""


def start(forks: "Forks", cwd: Path, port: int, *args: object, ranks: range = range(3)) -> "list[Forked]":
    env = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 3}
    return [forks.start(TRAINING, *args, cwd=cwd, RANK=rank, **env) for rank in ranks]


def wait_until(*processes: "Forked", text: str) -> None:
    until = time.monotonic() + 60
    while not all(text in process.out + process.err for process in processes):
        assert time.monotonic() < until, [process.out + process.err for process in processes]
        time.sleep(0.01)


def test_all_is_well(forks: "Forks", tmp_path: Path, closed_port: int) -> None:
    processes = start(forks, tmp_path, closed_port, 10)
    assert [process.wait() for process in processes] == [0, 0, 0], [process.err for process in processes]
    assert processes[0].err.startswith("Waiting for 3 processes (RANK and WORLD_SIZE) at localhost:")
    assert processes[1].err + processes[2].err == ""


@pytest.mark.parametrize("victim", [0, 2])
def test_one_is_killed(forks: "Forks", tmp_path: Path, closed_port: int, victim: int) -> None:
    processes = start(forks, tmp_path, closed_port, 100_000)
    wait_until(*processes, text="going")
    processes[victim].kill()
    for rank in set(range(3)) - {victim}:
        assert processes[rank].wait(30) == 1
        assert processes[rank].err.count("Error: Another process of this training is gone") == 1
        assert "--resume" in processes[rank].err
        assert "Traceback" not in processes[rank].err


def test_one_fails(forks: "Forks", tmp_path: Path, closed_port: int) -> None:
    processes = start(forks, tmp_path, closed_port, 100_000, 1)
    assert [process.wait(30) for process in processes] == [1, 1, 1]
    assert processes[1].err == "Error: the picture 7 is bad\n"
    assert "look at what it printed" in processes[2].err


def test_all_are_interrupted(forks: "Forks", tmp_path: Path, closed_port: int) -> None:
    """As by Ctrl-C, and by torchrun or Slurm; one may be told so by the end of another."""
    processes = start(forks, tmp_path, closed_port, 100_000)
    wait_until(*processes, text="going")
    for process in processes:
        process.send(signal.SIGTERM)
    assert {process.wait(30) for process in processes} <= {130, 1}
    assert "Interrupted." in "".join(process.err for process in processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lone_process_can_be_ended(forks: "Forks", tmp_path: Path, closed_port: int, rank: int, number: int) -> None:
    (process,) = start(forks, tmp_path, closed_port, 10, ranks=range(rank, rank + 1))
    if rank == 0:
        wait_until(process, text="Waiting for 3 processes")
    time.sleep(0.5)
    process.send(number)
    assert process.wait(10) in (-number, 130)


def test_they_do_not_come_together(forks: "Forks", tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        (process,) = start(forks, tmp_path, other.getsockname()[1], 10, ranks=range(1))
        assert process.wait(60) == 1
    assert "3 processes (RANK and WORLD_SIZE)" in process.err
    assert "did not come together" in process.err
    assert "Set MASTER_PORT to another one" in process.err


def test_torchrun_says_where() -> None:
    environment = dict(TORCH)
    assert set_rendezvous(environment) == 2
    assert environment == TORCH
    environment = {**TORCH, "LOCAL_RANK": ""}  # of Kubernetes
    assert set_rendezvous(environment) == 2
    assert environment["LOCAL_RANK"] == "0"
    assert set_rendezvous({}) == 1


def test_srun_is_told_in_the_variables_of_torchrun() -> None:
    environment = dict(STEP)
    assert [set_rendezvous(environment), set_rendezvous(environment)] == [4, 4]  # asked again
    assert [environment[name] for name in NAMES] == ["3", "4", "1", "127.0.0.7", "20007"]
    environment = {**STEP, "MASTER_ADDR": "127.0.0.9", "MASTER_PORT": "9", "SLURM_NODELIST": "[]"}
    set_rendezvous(environment)
    assert [environment[name] for name in NAMES[3:]] == ["127.0.0.9", "9"]


def test_jobs_have_ports_of_their_own() -> None:
    ports = []
    for job in ("123456", "12_1", "12_2", "x"):
        environment = {**STEP, "SLURM_JOB_ID": job}
        set_rendezvous(environment)
        ports.append(int(environment["MASTER_PORT"]))
    assert ports[0] == 23_456
    assert len(set(ports)) == 4
    assert all(20_000 <= port < 30_000 for port in ports)


@pytest.mark.parametrize(
    ("environment", "name_in_message"),
    [
        ({**TORCH, "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({**TORCH, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({**TORCH, "MASTER_ADDR": "a..b"}, "a..b, port 29500, has no address here"),
        ({**TORCH, "MASTER_PORT": "no-such-port"}, "port no-such-port, has no address here"),
        ({**STEP, "SLURM_NODELIST": "a..b"}, "Set MASTER_ADDR to a name or address by which all machines reach it"),
    ],
)
def test_what_makes_no_sense_is_named(environment: dict[str, str], name_in_message: str) -> None:
    with pytest.raises(LaunchError) as error:
        set_rendezvous(dict(environment))
    assert name_in_message in str(error.value)


def test_the_first_of_several_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {**STEP, "SLURM_NODELIST": "127.0.0.[3-4]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="Set MASTER_ADDR"):
        set_rendezvous(dict(variables))
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$1 $2 $3" > {tmp_path}/asked\necho 127.0.0.3\necho 127.0.0.4\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    environment = dict(variables)
    set_rendezvous(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.3"
    assert (tmp_path / "asked").read_text() == "show hostnames 127.0.0.[3-4]\n"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [::1]:1: Connection reset"),
            True,
        ),
        (RuntimeError("Connection closed by peer [127.0.0.1]:23456"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("size mismatch, got input (4), mat (4x3)"), False),
        (KdpipeError("the connection closed is a name of a class"), False),
        (ZeroDivisionError("gloo"), False),
    ],
)
def test_what_says_that_others_are_lost(error: Exception, is_lost: bool) -> None:
    assert lost_others(error) == is_lost
    wrapped = KdpipeError("The first training step failed.")
    wrapped.__cause__ = error
    assert lost_others(wrapped) == is_lost
