"""A training that is stopped and gone on with, as users do it: other settings, averaged weights, lost files."""

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.pipelines.detectors.checkpoints import register_safe_types

if TYPE_CHECKING:
    from tests.conftest import Forks
    from tests.pipelines.conftest import Kit

EACH_STEP = ("-o", "default_hooks.logger.interval=1")


def command(kit: "Kit", work_dir: Path, *options: object) -> tuple[object, ...]:
    """A plain student on eight images, four of them in a step."""
    return kit.student_command(work_dir, "--methods", "none", *EACH_STEP, *options)


def load(path: Path) -> Any:
    register_safe_types()
    return torch.load(path, map_location="cpu", weights_only=True)


def rates(work_dir: Path) -> list[float]:
    """The rate of each step of the newest run, as its log says."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda file: file.stat().st_mtime_ns)
    return [line["lr"] for line in map(json.loads, newest.read_text().splitlines()) if "lr" in line]


def cosine(peak: float, total: int, start: int) -> list[float]:
    """Rates of a schedule without a warm-up, from a step on."""
    return [peak * (1 + math.cos(math.pi * step / total)) / 2 for step in range(start, total)]


def with_hooks(kit: "Kit", work: Path, *hooks: dict[str, Any]) -> tuple[object, ...]:
    """The student, with hooks in its config."""
    (work / "hooks.py").write_text(f"{kit.student.read_text()}\ncustom_hooks = {list(hooks)}\n")
    return "--student", work / "hooks.py"


@pytest.fixture(scope="module")
def trained(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of two steps."""
    work_dir = tmp_path_factory.mktemp("trained") / "w"
    kit.run(*command(kit, work_dir, "--epochs", 2, *kit.val))
    assert rates(work_dir) == pytest.approx(cosine(0.0075, 4, 0), rel=1e-6)
    return work_dir


@pytest.mark.parametrize(
    ("options", "message", "expected_rates"),
    [
        (("--epochs", 4), "epochs 2 -> 4", cosine(0.0075, 8, 4)),
        (("--epochs", 4, "--lr", 0.01), "epochs 2 -> 4, lr 0.0075 -> 0.01", cosine(0.01, 8, 4)),
        (
            ("--epochs", 3, "--batch-size", 8),
            "epochs 2 -> 3, batch_size 4 -> 8, lr 0.0075 -> 0.015",
            cosine(0.015, 3, 2),
        ),
    ],
)
def test_another_schedule_goes_on_where_it_would_be(
    trained: Path, kit: "Kit", work: Path, options: tuple[object, ...], message: str, expected_rates: list[float]
) -> None:
    shutil.copytree(trained, work / "w")
    ended = kit.run(*command(kit, work / "w", *kit.val, *options, "--resume"))
    assert f"Changed: {message}." in ended.out
    assert "student: 2 of" in ended.out
    # of this run: one that begins in the second of the other shares its log
    assert rates(work / "w")[-len(expected_rates) :] == pytest.approx(expected_rates, rel=1e-6)
    epochs = int(str(options[1]))
    newest = load(work / "w" / f"epoch_{epochs}.pth")
    assert newest["meta"]["iter"] == epochs * (len(expected_rates) // (epochs - 2))
    assert (work / "w" / "last_checkpoint").read_text().startswith(str(work))  # and not of where it was copied from
    assert json.loads((work / "w" / "kdpipe" / "recipe.json").read_text())["epochs"] == epochs


def test_what_is_refused_changes_nothing(trained: Path, kit: "Kit", work: Path) -> None:
    shutil.copytree(trained, work / "w")
    (work / "w" / "kdpipe" / "lock").unlink()  # says who came last
    before = kit.tree(work / "w")
    for options, name_in_message in {
        ("--epochs", 1): "2 epochs are done already, and --epochs is 1",
        ("--epochs", 3, "--seed", 1): "config.randomness.seed: found 0, wanted 1",
        ("--epochs", 3, "--scale", "96x64"): "scale",
        ("--epochs", 3, "-o", "model.backbone.depth=34"): "config.model.backbone.depth: found 18, wanted 34",
        ("--epochs", 3, "-o", "optim_wrapper.optimizer.momentum=0.5"): "momentum: found 0.9, wanted 0.5",
        ("--epochs", 3, "-o", "default_hooks.checkpoint.out_dir=x"): "default_hooks.checkpoint.out_dir cannot be set",
    }.items():
        assert name_in_message in kit.refused(*command(kit, work / "w", *kit.val, *options, "--resume"))
        (work / "w" / "kdpipe" / "lock").unlink(missing_ok=True)
        assert kit.tree(work / "w") == before


def older(path: Path, old: Path) -> None:
    shutil.copy(old, path)


def damaged(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("lost", [older, damaged])
def test_files_lost_between_the_last_checkpoint_and_the_end(
    trained: Path, kit: "Kit", work: Path, lost: Callable[[Path, Path], None]
) -> None:
    shutil.copytree(trained, work / "w")
    result = json.loads((work / "w" / "result.json").read_text())
    for name in ("epoch_2.student.pth", "kdpipe/validation.json"):
        (work / "w" / name).unlink()
    lost(work / "w" / "student.pth", trained / "epoch_1.student.pth")
    ended = kit.run(*command(kit, work / "w", "--epochs", 2, *kit.val, "--resume"))
    assert "2 of 2 epochs are done; nothing is left to train" in ended.out
    assert json.loads((work / "w" / "result.json").read_text()) == result
    for name in ("student.pth", "epoch_2.student.pth"):
        one, two = load(trained / name), load(work / "w" / name)
        assert one["meta"] == two["meta"] | {"cfg": one["meta"]["cfg"]}
        assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])


KILLED = """
import os, signal, sys
from kdpipe.pipelines.cli.main import main
from kdpipe.pipelines.training.plain_checkpoints import PlainCheckpointHook

PlainCheckpointHook.after_train_epoch = lambda hook, runner: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def test_killed_between_the_last_checkpoint_and_the_student(kit: "Kit", work: Path, forks: "Forks") -> None:
    whole, cut = (command(kit, work / name, *kit.val) for name in ("whole", "cut"))
    kit.run(*whole)
    killed = forks.start(KILLED, *cut, cwd=work)
    assert killed.wait() == -signal.SIGKILL, killed.err
    assert (work / "cut" / "epoch_1.pth").is_file()
    assert not (work / "cut" / "student.pth").exists()
    ended = kit.run(*cut, "--resume")
    assert "1 of 1 epochs are done; nothing is left to train" in ended.out
    one, two = (load(work / name / "student.pth") for name in ("whole", "cut"))
    assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])
    assert {**one["meta"], "cfg": ""} == {**two["meta"], "cfg": ""}
    one, two = (json.loads((work / name / "result.json").read_text()) for name in ("whole", "cut"))
    assert (one["epoch"], one["metrics"]) == (two["epoch"], two["metrics"])
    assert f"AP {two['ap']:.3f}" in ended.out


def test_a_damaged_checkpoint(trained: Path, kit: "Kit", work: Path) -> None:
    shutil.copytree(trained, work / "w")
    run = command(kit, work / "w", "--epochs", 2, *kit.val, "--resume")
    damaged(work / "w" / "epoch_2.pth", trained)
    message = kit.refused(*run)
    assert "epoch_2.pth is damaged" in message
    assert "last_checkpoint" in message
    (work / "w" / "last_checkpoint").write_text("epoch_1.pth")
    kit.run(*run)
    one, two = (load(folder / "epoch_2.pth")["state_dict"] for folder in (trained, work / "w"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_checkpoint_from_elsewhere(trained: Path, kit: "Kit", work: Path) -> None:
    start = ("-o", f"load_from={trained / 'epoch_1.pth'}", "-o", "resume=True")
    ended = kit.run(*command(kit, work / "w", "--epochs", 2, *kit.val, *start))
    assert f"Going on from {trained / 'epoch_1.pth'}" in ended.out
    one, two = (load(folder / "epoch_2.pth")["state_dict"] for folder in (trained, work / "w"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert "Or use --resume" in kit.refused(*command(kit, work / "v", "-o", "resume=True"))
    assert not (work / "v").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "ExpMomentumEMA",
        pytest.param("ExponentialMovingAverage", marks=pytest.mark.slow),
        pytest.param("StochasticWeightAverage", marks=pytest.mark.slow),
    ],
)
def test_averaged_weights_are_measured_saved_and_resumed(kit: "Kit", work: Path, kind: str) -> None:
    hooks = with_hooks(kit, work, {"type": "EMAHook", "ema_type": kind})
    run = ("--methods", "cls", "--epochs", 2, *hooks, *kit.val)
    kit.run(*kit.student_command(work / "straight", *run))
    kit.interrupted(*kit.student_command(work / "w", *run))
    kit.run(*kit.student_command(work / "w", *run, "--resume"))
    straight, resumed = (load(work / x / "epoch_2.pth") for x in ("straight", "w"))
    averaged = load(work / "w" / "student.pth")["state_dict"]
    for name, value in straight["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
        if name.startswith("student."):
            assert torch.equal(value, averaged[name.removeprefix("student.")]), name
    trained = resumed["ema_state_dict"]  # mmengine keeps there what is trained
    assert any(not torch.equal(value, trained[f"module.student.{name}"]) for name, value in averaged.items())


def test_a_training_that_stops_early(kit: "Kit", work: Path) -> None:
    hook = {"type": "EarlyStoppingHook", "monitor": "coco/bbox_mAP", "patience": 1, "min_delta": 1.0}
    run = command(kit, work / "w", "--epochs", 6, *with_hooks(kit, work, hook), *kit.val)
    message = "student: stopped early, after epoch 2 of 6; EarlyStoppingHook: coco/bbox_mAP has not got better by 1.0"
    assert message in kit.run(*run).out
    assert load(work / "w" / "student.pth")["meta"]["epoch"] == 2
    assert json.loads((work / "w" / "result.json").read_text())["epoch"] == 2
    assert message in kit.run(*run, "--resume").out  # it has stopped, and does not forget
    assert load(work / "w" / "student.pth")["meta"]["epoch"] == 2
    with_hooks(kit, work, {**hook, "patience": 2})
    kit.run(*run, "--resume")
    assert load(work / "w" / "student.pth")["meta"]["epoch"] == 3
    kit.run(*command(kit, work / "w", "--epochs", 4, *kit.val, "--resume"))
    assert load(work / "w" / "student.pth")["meta"]["epoch"] == 4


def test_patience_is_kept_where_the_last_epoch_was_not_measured(kit: "Kit", work: Path) -> None:
    """As where a training is killed while it validates, or resumed between two validations."""
    hook = {"type": "EarlyStoppingHook", "monitor": "coco/bbox_mAP", "patience": 3, "min_delta": 1.0}
    student, measured = with_hooks(kit, work, hook), work / "w" / "kdpipe" / "validation.json"
    kit.run(*command(kit, work / "w", "--epochs", 2, *student, *kit.val))
    of_second = measured.read_bytes()
    kit.run(*command(kit, work / "w", "--epochs", 3, *student, *kit.val, "--resume"))
    measured.write_bytes(of_second)
    ended = kit.run(*command(kit, work / "w", "--epochs", 6, *student, *kit.val, "--resume"))
    assert "student: stopped early, after epoch 4 of 6" in ended.out


def test_the_users_files_are_kept(kit: "Kit", work: Path) -> None:
    """Also a config of the user's own, in the directory that is trained in."""
    shutil.copy(kit.student, work / "student.py")
    for name in ("train.json", "val.json", "notes.txt"):
        (work / name).write_text("mine")
    before = kit.tree(work)
    run = ("--student", "student.py", "-o", "model.backbone.depth=17", *kit.val)
    assert "cannot be built" in kit.refused(*command(kit, Path(), *run))
    assert kit.tree(work) == before
    assert {path.name for path in work.iterdir()} == set(before)
    kit.run(*command(kit, Path(), "--student", "student.py", *kit.val))
    assert before.items() <= kit.tree(work).items()
    (work / "other").mkdir()
    (work / "other" / "student.pth").write_text("mine")
    assert "holds student.pth" in kit.refused(*command(kit, work / "other"))
    assert (work / "other" / "student.pth").read_text() == "mine"
