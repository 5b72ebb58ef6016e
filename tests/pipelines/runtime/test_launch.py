"""What the variables of torchrun, Slurm and Kubernetes say of this process."""

import pytest

from kdpipe.pipelines.runtime.launch import LaunchError, doubts, find_rank, find_shard, is_first

TORCH = {"RANK": "1", "WORLD_SIZE": "2"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}
SCRIPT = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}  # of sbatch
POD = {"JOB_COMPLETION_INDEX": "5"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, (0, 1)),
        ({"RANK": "0"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": " 1 "}, (0, 1)),
        (TORCH, (1, 2)),
        ({**STEP, **TORCH}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, (0, 1)),  # salloc
        (SCRIPT, (0, 1)),
        ({**STEP, "SLURM_NTASKS": "4"}, (3, 4)),
        ({**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),  # a shell in a job
        ({**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
    ],
)
def test_processes_of_torchrun_and_srun(environment: dict[str, str], rank: tuple[int, int]) -> None:
    actual = find_rank(environment)
    assert (actual.index, actual.count) == rank
    assert find_shard(environment) == actual


@pytest.mark.parametrize(
    ("environment", "option", "shard", "source"),
    [
        ({}, (2, 8), (2, 8), "--shard"),
        ({**TORCH, **ARRAY}, (0, 1), (0, 1), "--shard"),
        (ARRAY, None, (2, 4), "SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT"),
        ({**ARRAY, "SLURM_ARRAY_TASK_STEP": "2"}, None, (1, 4), "SLURM_ARRAY_TASK_ID"),
        ({**ARRAY, "SLURM_ARRAY_TASK_MIN": "12", "SLURM_ARRAY_TASK_COUNT": "1"}, None, (0, 1), ""),  # one of them again
        ({**ARRAY, **SCRIPT}, None, (2, 4), "SLURM_ARRAY_TASK_ID"),
        ({**ARRAY, **STEP, "SLURM_NTASKS": "5"}, None, (13, 20), "SLURM_PROCID"),
        ({**ARRAY, **TORCH}, None, (5, 8), "WORLD_SIZE"),
        (POD, (None, 8), (5, 8), "JOB_COMPLETION_INDEX"),
        ({**POD, **TORCH}, (None, 8), (11, 16), "JOB_COMPLETION_INDEX and RANK and WORLD_SIZE"),
        (POD, None, (0, 1), ""),
    ],
)
def test_shards(
    environment: dict[str, str], option: tuple[int | None, int] | None, shard: tuple[int, int], source: str
) -> None:
    actual = find_shard(environment, option)
    assert (actual.index, actual.count) == shard
    assert source in actual.source
    assert bool(source) == bool(actual.source)


def test_shards_of_an_array_are_all_different() -> None:
    """Also where each task of the array has a step of its own, and the array counts in steps."""
    actual = [
        find_shard(
            {
                **{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "3"},
                **{"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2"},
            }
        )
        for task in (1, 4, 7)
        for rank in (0, 1)
    ]
    assert [(shard.index, shard.count) for shard in actual] == [(index, 6) for index in range(6)]


@pytest.mark.parametrize(
    ("environment", "option", "name_in_message"),
    [
        ({**TORCH, "RANK": "abc"}, None, "RANK is 'abc'"),
        ({**TORCH, "RANK": "2"}, None, "RANK is '2'; expected is a whole number from 0 to 1, since WORLD_SIZE is 2"),
        ({**TORCH, "RANK": "-1"}, None, "RANK is '-1'"),
        ({**TORCH, "RANK": ""}, None, "WORLD_SIZE is 2, and RANK is not set"),
        ({**TORCH, "WORLD_SIZE": "0"}, None, "WORLD_SIZE is '0'; expected is a whole number from 1"),
        ({**TORCH, "WORLD_SIZE": "2.0"}, None, "WORLD_SIZE is '2.0'"),
        ({**STEP, "SLURM_NTASKS": "many"}, None, "SLURM_NTASKS is 'many'"),
        ({**STEP, "SLURM_NTASKS": "4", "SLURM_PROCID": "x"}, None, "SLURM_PROCID is 'x'"),
        ({**STEP, "SLURM_NTASKS": "2"}, None, "SLURM_PROCID is '3'"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "20"}, None, "the numbers of the array have gaps"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "13", "SLURM_ARRAY_TASK_STEP": "2"}, None, "have gaps"),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "?"}, None, "SLURM_ARRAY_TASK_COUNT is '?'"),
        (POD, (None, 5), "JOB_COMPLETION_INDEX is '5'; expected is a whole number from 0 to 4, since --shard says 5"),
        ({}, (None, 5), "completionMode: Indexed"),
    ],
)
def test_what_makes_no_sense_is_named(
    environment: dict[str, str],
    option: tuple[int | None, int] | None,
    name_in_message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(LaunchError) as error:
        find_shard(environment, option)
    assert name_in_message in str(error.value)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert isinstance(is_first(), bool)  # and is no reason for commands without others to fail


@pytest.mark.parametrize(
    ("environment", "option", "typed", "doubt"),
    [
        ({}, None, True, ""),
        (TORCH, None, False, "unset RANK and WORLD_SIZE"),  # of PyTorchJob in Kubernetes, or left over
        ({**TORCH, "TORCHELASTIC_RUN_ID": "none"}, None, True, ""),
        ({**STEP, "SLURM_NTASKS": "4"}, None, False, ""),
        ({**STEP, "SLURM_NTASKS": "4"}, None, True, "unset SLURM_PROCID and SLURM_NTASKS"),  # srun --pty
        (ARRAY, None, False, ""),
        (ARRAY, None, True, "unset SLURM_ARRAY_TASK_ID"),
        ({}, (0, 8), True, ""),
        (SCRIPT, None, False, "This job has 4 tasks, and this is one process: start it by srun"),
        ({**SCRIPT, "SLURM_NTASKS": "1"}, None, False, ""),
        (POD, None, False, "each pod of this job makes the whole cache"),
        (POD, (None, 8), False, ""),
    ],
)
def test_a_lone_process_is_told(
    environment: dict[str, str], option: tuple[int | None, int] | None, typed: bool, doubt: str
) -> None:
    actual = doubts(find_shard(environment, option), environment, is_interactive=typed)
    assert bool(actual) == bool(doubt)
    assert doubt in "".join(actual)
