"""What the variables of torchrun and Slurm say of this process."""

from pathlib import Path

import pytest

from kdpipe.pipelines.runtime.launch import Launch, LaunchError, find_launch, is_first

TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODELIST": "n7"}


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "0"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": " 1 ", "LOCAL_RANK": "x"}, (0, 1)),
        (TORCH, (1, 2)),
        ({**STEP, **TORCH}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, (0, 1)),  # salloc
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, (0, 1)),  # the script of sbatch
        ({**STEP, "SLURM_NTASKS": "4"}, (3, 4)),
        ({**STEP, "SLURM_NTASKS": "4(x2)"}, (3, 8)),
        ({**STEP, "SLURM_NTASKS": "2(x2),1"}, (3, 5)),
        ({**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),  # a shell in a job
        ({**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
    ],
)
def test_the_place_of_a_process(given: dict[str, str], place: tuple[int, int]) -> None:
    launch = find_launch(dict(given))
    assert (launch.rank, launch.size) == place


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": "abc"}, "RANK is 'abc'"),
        ({"RANK": "2"}, "RANK is '2'; expected is a whole number from 0 to 1, since WORLD_SIZE is 2"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": ""}, "WORLD_SIZE is 2, and 'RANK' is not set"),
        ({"WORLD_SIZE": ""}, "RANK is '1'; expected is a whole number from 0 to 0, since WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; expected is a whole number from 1"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"LOCAL_RANK": "gpu"}, "LOCAL_RANK is 'gpu'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'; expected is a whole number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"MASTER_PORT": ""}, "'MASTER_PORT' is not set"),
        ({"MASTER_ADDR": ""}, "'MASTER_ADDR' is not set"),
        ({"RANK": "", **STEP, "SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
        ({"RANK": "", **STEP, "SLURM_NTASKS": "4", "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        ({"RANK": "", **STEP, "SLURM_NTASKS": "2"}, "SLURM_PROCID is '3'"),
    ],
)
def test_what_makes_no_sense_is_named(changes: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**TORCH, **changes}
    with pytest.raises(LaunchError) as error:
        find_launch(dict(given))
    assert named in str(error.value)
    assert "unset " in str(error.value)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert isinstance(is_first(), bool)  # and is no reason for commands without others to fail


def test_srun_is_told_in_the_variables_of_torchrun() -> None:
    environment = {**STEP, "SLURM_NTASKS": "4"}
    assert find_launch(environment) == Launch(3, 4, "n7", 20_007, ("SLURM_PROCID", "SLURM_NTASKS"))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in names] == ["3", "4", "1", "n7", "20007"]
    assert (find_launch(environment).rank, find_launch(environment).port) == (3, 20_007)  # asked again
    given = {"MASTER_ADDR": "a", "MASTER_PORT": "9", "SLURM_NODELIST": "[]"}
    assert find_launch({**STEP, "SLURM_NTASKS": "4", **given}).host == "a"


def test_jobs_have_ports_of_their_own() -> None:
    ports = [
        find_launch({**STEP, "SLURM_NTASKS": "4", "SLURM_JOB_ID": job}).port for job in ("123456", "12_1", "12_2", "x")
    ]
    assert ports[0] == 23_456
    assert len(set(ports)) == 4
    assert all(20_000 <= port < 30_000 for port in ports)


def test_kubernetes_names_no_local_rank() -> None:
    environment = {**TORCH, "LOCAL_RANK": ""}
    find_launch(environment)
    assert environment["LOCAL_RANK"] == "0"


def test_the_first_of_several_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**STEP, "SLURM_NTASKS": "4", "SLURM_NODELIST": "node[3-4]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="Set MASTER_ADDR"):
        find_launch(dict(given))
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$1 $2 $3" > {tmp_path}/asked\necho node3\necho node4\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert find_launch(dict(given)).host == "node3"
    assert (tmp_path / "asked").read_text() == "show hostnames node[3-4]\n"
