"""Every loss, broken on purpose in one place, fails an ordinary test of this folder: those tests can fail."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.autograd.gradcheck import GradcheckError

from kdpipe.distill.losses import (
    boxes,
    ckd,
    ckd_negatives,
    ckd_queue,
    ckd_sliced,
    cross,
    hard,
    imitation,
    masks,
    pkd,
    prediction,
    relations,
    roifi,
    sgfi,
)

HERE = Path(__file__).parent
EQUATION = "test_it_is_the_equation"
SLICES = "test_in_slices_it_is_the_same"
MODULE_OF_CKD = "test_the_module_is_the_equation_over_batch_and_queue"
# Tests of a module that stand in the file of another.
IN = {"ckd_sliced": "ckd", "ckd_negatives": "ckd"}
MODULE_OF_SGFI = "test_the_module_is_adapt_then_embed_then_the_loss"
SOME_BACKGROUND = {"student_classes": 3, "teacher_classes": 3, "labels": [0, 1, 2, 3, 3, 1]}

# Module, the test that has to fail, its arguments, and mutations by name: a text that is in the module's source exactly
# once, what stands in its place, and more such pairs where one is not enough.
MUTATIONS: list[tuple[ModuleType, str, Mapping[str, Any], Mapping[str, tuple[str, ...]]]] = [
    (
        sgfi,
        EQUATION,
        {"temperature": 0.5},
        {
            "softmax over the RoIs": ("/ temperature).softmax(dim=1)", "/ temperature).softmax(dim=0)"),
            "no temperature": ("keys, query) / temperature)", "keys, query))"),
            "times the temperature": ("keys, query) / temperature)", "keys, query) * temperature)"),
            "the same weight for all levels": ("keys, query) / temperature)", "keys, query) * 0)"),
            "keys of another RoI": ("), embed(teacher)\n", "), embed(teacher).roll(1, 0)\n"),
            "a sum over channels and cells": (
                "(mixed - teacher).square().flatten(1).mean(dim=1)",
                "(mixed - teacher).square().flatten(1).sum(dim=1)",
            ),
            "absolute in place of squared": ("(mixed - teacher).square()", "(mixed - teacher).abs()"),
        },
    ),
    (
        sgfi,
        "test_gradients",
        {},
        {
            "the teacher learns": (
                "full_precision(student_roi_features, teacher_roi_features.detach())",
                "(student_roi_features, teacher_roi_features)",
            )
        },
    ),
    (
        sgfi,
        MODULE_OF_SGFI,
        {"kernel": 1},
        {
            "keys without the bias of f_adapt": (" + first.weight.sum(dim=(2, 3)) @ self.adapt.bias", ""),
            "teacher's keys not the embedding's": ("self.embed(teacher))", "self.embed(teacher * 2))"),
            "no temperature": ("(similarity / self.temperature)", "(similarity)"),
            "softmax over the RoIs": ("self.temperature).softmax(dim=1)", "self.temperature).softmax(dim=0)"),
            "a sum over channels and cells": (
                "- teacher).square().flatten(1).mean(dim=1))\n        return",
                "- teacher).square().flatten(1).sum(dim=1))\n        return",
            ),
        },
    ),
    (
        sgfi,
        "test_normalized_it_is_the_loss_at_features_of_zero_mean_and_unit_variance",
        {},
        {
            "statistics of each level": (
                "standardize(adapted, 2)",
                "standardize(adapted.flatten(1, 2), 1).view_as(adapted)",
            ),
            "the teacher is left as it is": ("standardize(teacher, 1)", "teacher"),
            "the student is left as it is": ("standardize(adapted, 2)", "adapted"),
        },
    ),
    (
        imitation,
        EQUATION,
        {},
        {
            "a mean over channels": (".square().sum(dim=1)", ".square().mean(dim=1)"),
            "not halved": ("/ (2 * torch.where", "/ (1 * torch.where"),
            "all cells are counted": ("counts.append(weight.sum())", "counts.append(torch.ones_like(weight).sum())"),
            "no mask": (".sum(dim=1) * weight).sum()", ".sum(dim=1)).sum()"),
            "each level by its own count": (
                ".sum(dim=1) * weight).sum())",
                ".sum(dim=1) * weight).sum() / weight.sum() * weight.numel())",
            ),
        },
    ),
    (
        imitation,
        "test_gradients",
        {},
        {"the teacher learns": ("target.detach()", "target")},
    ),
    *(
        (imitation, "test_the_modules_adapt_each_level_and_imitate_under_their_mask", {"name": name}, changes)
        for name, changes in {
            "whole": {
                "cells that the teacher did not see": ("inside if mask is None", "inside * 0 + 1 if mask is None")
            },
            "gt-mask": {
                "of a box in place of the mask": (
                    "_of_images(box_mask, gt_boxes)",
                    "_of_images(gaussian_mask, gt_boxes)",
                ),
                "one adapter for all levels": (
                    "zip(self.strides, self.adapt, strict=True)",
                    "zip(self.strides, [self.adapt[0]] * 2)",
                ),
                "cells that the teacher did not see": ("else inside * mask(", "else mask("),
            },
            "gaussian-mask": {
                "the mask of a box": ("_of_images(gaussian_mask, gt_boxes)", "_of_images(box_mask, gt_boxes)")
            },
            "anchor-mask": {"anchors of another level": ("base_anchors[stride]", "base_anchors[24 - stride]")},
        }.items()
    ),
    (
        masks,
        "test_cells_whose_centre_lies_in_a_box",
        {},
        {
            "corners of cells": ("dtype) + 0.5) * stride", "dtype) + 0.0) * stride"),
            "boxes that hold all of the others": ("across[:, None, :]).any(dim=0)", "across[:, None, :]).all(dim=0)"),
            "columns for rows": ("shape[::-1])\n    return x", "shape)\n    return x"),
        },
    ),
    (
        masks,
        "test_a_gaussian_in_each_box",
        {"sigma": 0.25},
        {
            "not cut off at the box": ("/ 2) * inside", "/ 2)"),
            "a sum over boxes": (".amax(dim=0)", ".sum(dim=0)"),
            "twice the variance": ("distance.square() / 2", "distance.square()"),
            "the centre is a corner": ("(first + last) / 2)", "first)"),
        },
    ),
    (
        masks,
        "test_cells_with_an_anchor_near_an_object",
        {},
        {
            "the largest IoU of all objects": ("dim=(1, 2), keepdim=True", "keepdim=True"),
            "a fixed threshold": ("ANCHOR_SHARE * largest", "ANCHOR_SHARE"),
            "the last anchor": ("torch.maximum(best, overlap", "(overlap"),
            "all objects": (
                ".any(dim=0).to(boxes.dtype)\n\n\ndef _centres",
                ".all(dim=0).to(boxes.dtype)\n\n\ndef _centres",
            ),
            "no union": (" + area - overlap)", " + area)"),
        },
    ),
    (
        pkd,
        EQUATION,
        {},
        {
            "not halved": ("(2 * level.shape[1]", "(level.shape[1]"),
            "a sum over channels": ("(2 * level.shape[1] * inside", "(2 * inside"),
            "statistics of all cells": (
                "standardize(s, 1, inside) - standardize(t, 1, inside)",
                "(standardize(s, 1) - standardize(t, 1)) * inside",
            ),
            "a mean over levels": ("torch.stack(losses).sum()", "torch.stack(losses).mean()"),
            "the teacher as it is": ("standardize(t, 1, inside)", "t * inside"),
        },
    ),
    (
        pkd,
        "test_gradients",
        {},
        {"the teacher learns": ("target.detach()", "target")},
    ),
    (
        roifi,
        EQUATION,
        {},
        {
            "a sum over channels and cells": (".flatten(1).mean(dim=1)", ".flatten(1).sum(dim=1)"),
            "absolute in place of squared": (".square()", ".abs()"),
            "features of another RoI": ("(student - teacher)", "(student - teacher.roll(1, 0))"),
        },
    ),
    (
        roifi,
        "test_gradients",
        {},
        {"the teacher learns": ("teacher_roi_features.detach()", "teacher_roi_features")},
    ),
    (
        ckd,
        EQUATION,
        {"with_queue": True, "with_exclude": True, "temperature": 0.07},
        {
            "positive excluded with its box": ("exclude & ~is_positive", "exclude"),
            "no exclusion": ("exclude & ~is_positive", "exclude & False"),
            "softmax over the students": (
                "cross_entropy(similarity, positive",
                "cross_entropy(similarity[:, :num_boxes].T, positive",
            ),
            "product in place of cosine": (
                "map(unit_rows, full_precision(student, keys))",
                "full_precision(student, keys)",
            ),
            "no temperature": ("s @ t.T / temperature", "s @ t.T"),
            "a sum over boxes": ('reduction="sum") / max(num_boxes, 1)', 'reduction="sum")'),
        },
    ),
    (
        ckd_sliced,
        SLICES,
        {"with_queue": True, "with_exclude": True, "temperature": 0.07, "rows": 2},
        {
            "positive missing from the denominator": (
                "            peak = similarity.amax(",
                "            similarity.diagonal(start).fill_(-torch.inf)\n            peak = similarity.amax(",
            ),
            "positive excluded with its box": ("similarity.diagonal(start).copy_(positive)", "similarity.zero_"),
            "no exclusion": (".masked_fill_(exclude[rows],", ".masked_fill_(exclude[rows] & False,"),
            "no temperature": ("student / temperature", "student"),
            "a sum over boxes": ("        return loss / count, is_nearest\n", "        return loss, is_nearest\n"),
            "gradient without the positive": ("slope.diagonal(start).sub_(1.0)", "slope.diagonal(start).sub_(0.0)"),
            "gradient of the last slice only": ("key_grad += slope", "key_grad = slope"),
            "positive of the first slice": ("similarity.diagonal(start).clone()", "similarity.diagonal(0).clone()"),
        },
    ),
    (
        ckd_negatives,
        "test_which_pairs_are_no_negatives",
        {},
        {
            "overlap at the threshold": ("columns]) > iou", "columns]) >= iou"),
            "of whatever image": ("(ids == image).nonzero()", "(ids == ids).nonzero()"),
        },
    ),
    (
        ckd_queue,
        "test_the_queue_drops_the_oldest_first",
        {},
        {"the newest leave the queue": ("new = new[-size:]", "new = new[:size]")},
    ),
    (
        ckd_queue,
        "test_a_queue_of_another_size_gives_its_newest",
        {"size": 3, "expected": [4, 5, 6], "then": [5, 6, 7]},
        {
            "the oldest are kept": ("cursor) % stored)[-size:]", "cursor) % stored)[:size]"),
            "the next one replaces the newest": (
                "torch.tensor(len(rows) % size)",
                "torch.tensor((len(rows) - 1) % size)",
            ),
        },
    ),
    (
        ckd,
        MODULE_OF_CKD,
        {"projection": "linear"},
        {
            "the queue is not asked": (
                "TeacherKeys.join([teacher_keys, others, self.queue.keys()])",
                "TeacherKeys.join([teacher_keys, others])",
            ),
            "nothing joins the queue": ("self.queue.push(new)", "pass"),
        },
    ),
    (
        prediction,
        "test_classification_is_the_equation",
        {},
        {
            "softmax over the RoIs": ("(teacher.softmax(dim=1) * student", "(teacher.softmax(dim=0) * student"),
            "the student's softmax over the RoIs": ("student.log_softmax(dim=1)", "student.log_softmax(dim=0)"),
            "background left out": ("log_softmax(dim=1)).sum(dim=1)", "log_softmax(dim=1))[:, :-1].sum(dim=1)"),
            "student and teacher the other way round": (
                "(teacher.softmax(dim=1) * student.log_softmax(dim=1))",
                "(student.softmax(dim=1) * teacher.log_softmax(dim=1))",
            ),
        },
    ),
    (
        prediction,
        "test_classification_of_dense_students_is_the_equation",
        {},
        {
            "background included": ("log_scores)[:, :-1].sum(dim=1)", "log_scores).sum(dim=1)"),
            "maximum over the object classes": ("student.amax(dim=1", "student[:, :-1].amax(dim=1"),
            "not divided by the maximum": ("student - student.amax(dim=1, keepdim=True)", "student.log_softmax(dim=1)"),
            "softmax over the RoIs": ("(teacher.softmax(dim=1) * log_scores)", "(teacher.softmax(dim=0) * log_scores)"),
        },
    ),
    (
        prediction,
        "test_class_aware_regression_is_the_equation",
        {},
        {
            "absolute value before the class sum": (
                "weights, teacher - student)",
                "weights, (teacher - student).abs())",
            ),
            "background included": ("logits.softmax(dim=1)[:, :num_classes]", "logits.softmax(dim=1)[:, 1:]"),
            "softmax without background": (
                "logits.softmax(dim=1)[:, :num_classes]",
                "logits[:, :num_classes].softmax(dim=1)",
            ),
            "softmax over the RoIs": (
                "logits.softmax(dim=1)[:, :num_classes]",
                "logits.softmax(dim=0)[:, :num_classes]",
            ),
            "a mean over the coordinates": ("difference.abs().sum(dim=1)", "difference.abs().mean(dim=1)"),
        },
    ),
    (
        prediction,
        "test_regression_is_the_equation",
        SOME_BACKGROUND,
        {
            "background included": (
                "is_object, of_class = labels < classes",
                "is_object, of_class = labels <= classes",
            ),
            "box of another class": ("of_class if student.shape[1] > 1 else 0", "0"),
            "a mean over the objects": (
                "mean_or_zero(torch.where(is_object, distance, 0.0))",
                "distance[is_object].mean()",
            ),
        },
    ),
    (
        relations,
        EQUATION,
        {},
        {
            "cosine in place of correlation": ("unit_rows(rows - rows.mean(dim=1, keepdim=True))", "unit_rows(rows)"),
            "over classes only": (" + _uncorrelated(of_student.T, of_teacher.T)", ""),
            "over RoIs only": ("_uncorrelated(of_student, of_teacher) + ", ""),
            "of logits": ("student.softmax(dim=1), teacher.softmax(dim=1)", "student, teacher"),
            "a sum over the rows": (
                "mean_or_zero(1 - (one * other).sum(dim=1))",
                "(1 - (one * other).sum(dim=1)).sum()",
            ),
        },
    ),
    (
        boxes,
        EQUATION,
        {"student": 3, "teacher": 3},
        {
            "IoU in place of GIoU": (" - (around - union) / (around + least)", ""),
            "background included": ("softmax(dim=1)[:, :-1]", "softmax(dim=1)[:, 1:]"),
            "softmax over the RoIs": ("logits.softmax(dim=1)", "logits.softmax(dim=0)"),
            "not weighted": ("(weights * (1 -", "(1 * (1 -"),
            "a mean over the classes": (")).sum(dim=1))", ")).mean(dim=1))"),
        },
    ),
    (
        cross,
        EQUATION,
        {"classes": 3},
        {
            "cross-entropy": ("teacher.log_softmax(dim=1) - crossed", "-crossed"),
            "the other way round": ("(teacher.softmax(dim=1) * difference)", "(crossed.softmax(dim=1) * -difference)"),
            "softmax over the RoIs": ("crossed.log_softmax(dim=1)", "crossed.log_softmax(dim=0)"),
            "no boxes": ("CrossResult(classes + boxes", "CrossResult(classes"),
            "boxes weighted by what is crossed": ("(*deltas, teacher_logits)", "(*deltas, cross_logits)"),
        },
    ),
    (
        cross,
        "test_it_is_the_teachers_head_on_adapted_features",
        {},
        {
            "no adapter": ("self._adapt(self._roi_align(rois, size)", "self._adapt(0 * self._roi_align(rois, size)"),
            "half is learned": ("return adapted", "return adapted.detach() / 2 + adapted / 2"),
        },
    ),
    (
        hard,
        EQUATION,
        {"classes": 3},
        {
            "background is regressed": ("labels < num_classes", "labels <= num_classes"),
            "box of another class": ("labels.clamp(max=deltas.shape[1] - 1)", "labels.clamp(max=0)"),
            "a mean over the coordinates": ("(moved - true).abs().sum(dim=1)", "(moved - true).abs().mean(dim=1)"),
        },
    ),
    (
        prediction,
        "test_recoding_keeps_the_box",
        {},
        {"times the stds": ("(mean_in - mean_out)) / std_out", "(mean_in - mean_out)) * std_out")},
    ),
]


def ordinary(module: ModuleType) -> ModuleType:
    """The tests of a module, loaded for themselves."""
    name = module.__name__.rpartition(".")[2]
    file = HERE / f"test_{IN.get(name, name)}.py"
    spec = importlib.util.spec_from_file_location(f"ordinary_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    return tests


def run(module: ModuleType, source: str, test: str, options: Mapping[str, Any]) -> None:
    """Run a test of a module with another source of that module."""
    other = ModuleType(module.__name__)
    exec(compile(source, str(module.__file__), "exec"), vars(other))
    tests = ordinary(module)
    for name, value in vars(tests).copy().items():
        if value is module:
            setattr(tests, name, other)
        elif getattr(value, "__module__", None) == module.__name__:
            setattr(tests, name, getattr(other, name))
    getattr(tests, test)(**options)


@pytest.mark.parametrize(
    ("module", "test", "options", "changes"),
    [
        pytest.param(module, test, options, changes, id=f"{test.removeprefix('test_')}, {name}")
        for module, test, options, mutations in MUTATIONS
        for name, changes in mutations.items()
    ],
)
def test_a_broken_loss_fails_a_test(
    module: ModuleType,
    test: str,
    options: dict[str, Any],
    changes: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    pair: Any,
) -> None:
    if test == SLICES:
        options = {**options, "monkeypatch": monkeypatch}
    if module is cross and test != EQUATION:
        options = {**options, "pair": pair}
    source = Path(str(module.__file__)).read_text()
    run(module, source, test, options)
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert source.count(old) == 1, f"{old!r} is in the source {source.count(old)} times, expected once"
        source = source.replace(old, new)
    with pytest.raises((AssertionError, GradcheckError)):
        run(module, source, test, options)
