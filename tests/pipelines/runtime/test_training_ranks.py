"""Processes that train together: how they meet, and what the user is told where they cannot go on."""

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime.training_ranks import lost_others

if TYPE_CHECKING:
    from tests.conftest import Forked, Forks

# A training in miniature: steps in which each process waits for the others.
TRAINING = """
import sys, time, torch
from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime import heartbeat
from kdpipe.pipelines.runtime import rendezvous
from kdpipe.pipelines.runtime import training_ranks
from kdpipe.pipelines.runtime import watchdog
from kdpipe.pipelines.cli.main import cli, main
from kdpipe.pipelines.runtime.console import stop
from kdpipe.pipelines.runtime.launch import trained_together

start, failing = float(sys.argv[1]), sys.argv[2:]
rendezvous._START_SECONDS, rendezvous._NOTICE_SECONDS = start, 0.3
heartbeat._BEAT_SECONDS = watchdog._LOOK_SECONDS = 0.2
training_ranks._DEAD_SECONDS = watchdog._SILENT_SECONDS = 2.0
watchdog._ASKED_SECONDS, training_ranks._ERROR_SECONDS = 4.0, 1.0

@cli.command("steps")
@trained_together
def steps():
    training_ranks.join_process_group({"backend": "nccl"})
    stop.between_steps = True
    for step in range(100_000):
        stop.check()
        torch.distributed.all_reduce(torch.ones(1))
        if step == 5:
            print("going", flush=True)
            if failing == [str(torch.distributed.get_rank())]:
                raise KdpipeError("the picture 7 is bad")
        time.sleep(0.002)

main(["steps"])
"""


@pytest.fixture(scope="module")
def forks(forking: "type[Forks]") -> "Iterator[Forks]":
    forks = forking(Path(__file__).parents[1], "kdpipe.pipelines.cli.main", "kdpipe.pipelines.runtime.training_ranks")
    yield forks
    forks.close()


@pytest.fixture
def variables() -> dict[str, object]:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    return {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "LOCAL_RANK": 0}


def start(
    forks: "Forks", cwd: Path, variables: dict[str, object], ranks: range, size: int, *args: object
) -> "list[Forked]":
    args = args or (60,)
    return [forks.start(TRAINING, *args, cwd=cwd, **variables, RANK=rank, WORLD_SIZE=size) for rank in ranks]


def wait_until(*processes: "Forked", text: str) -> None:
    until = time.monotonic() + 30
    while not all(text in process.out + process.err for process in processes):
        assert time.monotonic() < until, [process.out + process.err for process in processes]
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("signals", "codes", "message"),
    [
        ({0: signal.SIGKILL}, [-9, 1, 1], "number 0"),
        ({1: signal.SIGKILL}, [1, -9, 1], "number 1 of 3"),
        ({2: signal.SIGKILL, 1: signal.SIGTERM, 0: signal.SIGTERM}, [1, 1, -9], "number 2 of 3"),  # as torchrun does
        ({0: signal.SIGINT, 1: signal.SIGINT, 2: signal.SIGINT}, [130, 130, 130], ""),
        ({1: signal.SIGTERM}, [130, 130, 130], ""),
    ],
)
def test_one_message_and_its_exit_code(
    forks: "Forks",
    tmp_path: Path,
    variables: dict[str, object],
    signals: dict[int, int],
    codes: list[int],
    message: str,
) -> None:
    processes = start(forks, tmp_path, variables, range(3), 3)
    wait_until(*processes, text="going")
    for rank, number in signals.items():
        processes[rank].send(number)
    assert [process.wait(30) for process in processes] == codes, [process.err for process in processes]
    said = "".join(process.err for process in processes)
    assert "Internal" not in said
    if message:
        assert said.count("Error: ") == 1, said
        assert "Another process of this run is gone" in said
        assert message in said
        assert "--resume" in said
    else:
        assert said.strip() == "Interrupted."


@pytest.mark.parametrize("is_asked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_waiting_for_one_that_hangs_does_not_hang(
    forks: "Forks", tmp_path: Path, variables: dict[str, object], is_asked: bool
) -> None:
    """No signal reaches Python while torch waits for another process, as it does inside NCCL for one that is gone."""
    seconds = 60 if is_asked else 4
    code = TRAINING.replace("watchdog._ASKED", f"watchdog._GONE_SECONDS = {seconds}\nwatchdog._ASKED")
    processes = [forks.start(code, 60, cwd=tmp_path, **variables, RANK=n, WORLD_SIZE=3) for n in range(3)]
    wait_until(*processes, text="going")
    processes[2].send(signal.SIGSTOP)
    if is_asked:
        time.sleep(0.5)  # until the others wait for it
        processes[0].send(signal.SIGTERM)
        processes[1].send(signal.SIGTERM)
    codes = [process.wait(20) for process in processes[:2]]
    processes[2].kill()
    assert codes == [1, 1]
    said = "".join(process.err for process in processes)
    assert said.count("Error: Another process of this run is gone (number 2 of 3") == 1, said


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_is_the_message_of_all(
    forks: "Forks", tmp_path: Path, variables: dict[str, object], failing: int
) -> None:
    processes = start(forks, tmp_path, variables, range(2), 2, 60, failing)
    assert [process.wait(30) for process in processes] == [1, 1]
    assert "".join(process.err for process in processes) == "Error: the picture 7 is bad\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("rank", "said"), [(0, "Waiting for 3 processes (1 came)"), (1, "Waiting for the first process (this is number 1")]
)
def test_one_process_with_the_variables_of_several(
    forks: "Forks", tmp_path: Path, variables: dict[str, object], rank: int, said: str, number: int
) -> None:
    (process,) = start(forks, tmp_path, variables, range(rank, rank + 1), 3)
    wait_until(process, text=said)
    assert f"MASTER_PORT {variables['MASTER_PORT']}" in process.err
    asked = time.monotonic()
    process.send(number)
    assert process.wait(10) == 130
    assert time.monotonic() - asked < 3
    assert "Error" not in process.err


def test_what_listens_is_not_the_first_process(forks: "Forks", tmp_path: Path, variables: dict[str, object]) -> None:
    with socket.socket() as other:
        other.bind(("localhost", int(str(variables["MASTER_PORT"]))))
        other.listen()
        (process,) = start(forks, tmp_path, variables, range(1, 2), 2)
        wait_until(process, text="what listens there does not answer")
        process.send(signal.SIGTERM)
        assert process.wait(10) == 130


def test_patience_ends_with_what_to_do(forks: "Forks", tmp_path: Path, variables: dict[str, object]) -> None:
    processes = start(forks, tmp_path, variables, range(2), 3, 1)
    assert [process.wait(30) for process in processes] == [1, 1]
    (message,) = [process.err for process in processes if "Error: " in process.err]
    assert "3 processes (2 came)" in message.split("Error: ")[1]
    assert "unset RANK and WORLD_SIZE" in message


def test_two_with_one_number(forks: "Forks", tmp_path: Path, variables: dict[str, object]) -> None:
    processes = start(forks, tmp_path, variables, range(2), 3)
    processes += start(forks, tmp_path, variables, range(1, 2), 3)
    for process in processes:
        process.wait(30)
    said = "".join(process.err for process in processes)
    assert said.count("Error: ") == 1
    assert "Two processes of this run have the number 1" in said


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
