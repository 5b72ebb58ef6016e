"""What a dense student made while it computed its own loss."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.distill.losses.masks import Anchor
from kdpipe.distill.outputs import BatchRois, StudentOutputs
from kdpipe.distill.rois.pairing import pair_boxes
from kdpipe.distill.rois.proposals import propose
from kdpipe.distill.rois.sampling import sample_rois
from kdpipe.distill.rows import rows_of_each
from kdpipe.distill.students.protocol import BoxCoder
from kdpipe.distill.students.structure import base_anchors

if TYPE_CHECKING:
    from kdpipe.distill.students.dense import DenseStudent

_PAIR_IOU = 0.5  # least of a RoI that the student did not choose with its own box there


class DenseForward:
    """What a dense student made while it computed its own loss: `StudentForward`, and its only `StudentStage`.

    Args:
        student: Whose forward pass it is.

    Attributes:
        pyramid: Levels of the neck, Tensor[B, C, h_l, w_l].
        classification: Per level Tensor[B, C, h_l, w_l], of the last convolution of the classification branch.
        localization: The same of the localisation branch.
        scores: Per level Tensor[B, A * K, h_l, w_l], class scores of the head.
        regression: Per level Tensor[B, A * E, h_l, w_l], encoded boxes.
        ground_truth: Of each image, boxes Tensor[G, 4] (x1, y1, x2, y2, pixels of the network input) and labels
            int64[G] of the ground truth.
        metas: Of each image, `img_shape` among others.
    """

    index, weight = 0, 1.0
    box_coder: BoxCoder = (), ()  # what it regresses is no deltas

    def __init__(self, student: "DenseStudent") -> None:
        self._student = student
        self.strides = student.strides
        self.stages = [self]
        self.pyramid: list[Tensor] = []
        self.classification: list[Tensor] = []
        self.localization: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.regression: list[Tensor] = []
        self.ground_truth: Sequence[tuple[Tensor, Tensor]] = ()
        self.metas: Sequence[Any] = ()

    def start(self, levels: Sequence[Tensor]) -> None:
        """Take in the pyramid, with which a forward pass of the head begins."""
        self.pyramid[:] = levels
        self.classification.clear()
        self.localization.clear()

    @property
    def base_anchors(self) -> dict[int, list[Anchor]]:
        return base_anchors(self._student.head.prior_generator, self.strides)

    def sampled(self) -> tuple[BatchRois, Tensor, StudentOutputs]:
        """RoIs drawn among what the student proposes and the ground truth, and what it says of them.

        Its predictions become proposals as those of an RPN do (G-DetKD, section 4.3.2, which leaves the rest open):
        `propose`. With the boxes of the ground truth, they are matched with the latter and sampled as in a two-stage
        student. Positive is an IoU of at least 0.5, as for other RoIs here (the paper: above). Of a box of the ground
        truth the student says what it says of the prediction that overlaps it most, if that is enough for a pair. The
        outputs are part of the graph of the student's own loss.
        """
        student = self._student
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())  # follows the seed of the step, and takes no number from it
        rois, labels, positive, has_partner, predictions = [], [], [], [], []
        for image, (gt_boxes, gt_labels) in enumerate(self.ground_truth):
            objectness = [student.objectness(level[image].detach()) for level in self.scores]
            boxes, of = propose(objectness, partial(self._boxes, image))
            is_predicted, partner = pair_boxes(gt_boxes, self._boxes(image), _PAIR_IOU)
            sample = sample_rois(
                torch.cat([boxes, gt_boxes]),
                len(boxes),
                gt_boxes,
                gt_labels,
                sampling=student.sampling,
                num_classes=student.num_classes,
                generator=generator,
            )
            rois.append(functional.pad(sample.boxes, (1, 0), value=image))
            labels.append(sample.labels)
            positive.append(sample.positive)
            has_partner.append(torch.cat([torch.ones_like(of, dtype=torch.bool), is_predicted])[sample.rows])
            predictions.append(torch.cat([of, partner])[sample.rows])
        chosen, paired = BatchRois(torch.cat(rois), torch.cat(labels), torch.cat(positive)), torch.cat(has_partner)
        rows = paired.nonzero().squeeze(1)
        return chosen, paired, self._at(chosen.image_index[rows], torch.cat(predictions)[rows])

    def outputs_at(self, rois: Tensor) -> tuple[Tensor, StudentOutputs]:
        """What the student says at RoIs that it did not choose: each is paired with the box it overlaps most.

        The overlap of a pair is an IoU of at least 0.5.

        Args:
            rois: Tensor[R, 5] (image in the batch, x1, y1, x2, y2), pixels of the network input.

        Returns:
            Which of the RoIs have a partner, Tensor[R] bool, and the student's outputs at the partners of these.
        """
        images = rois[:, 0].long()
        has_partner, predictions = torch.zeros_like(images, dtype=torch.bool), torch.zeros_like(images)
        for image, rows in enumerate(rows_of_each(images, len(self.metas))):
            has_partner[rows], predictions[rows] = pair_boxes(rois[rows, 1:], self._boxes(image), _PAIR_IOU)
        rows = has_partner.nonzero().squeeze(1)
        return has_partner, self._at(images[rows], predictions[rows])

    def _boxes(self, image: int, rows: Sequence[Tensor] | None = None) -> Tensor:
        return self._student.boxes(self.regression, image, self.metas[image]["img_shape"][:2], rows)

    def _at(self, images: Tensor, predictions: Tensor) -> StudentOutputs:
        """The outputs of predictions Tensor[R] of images Tensor[R]; every level stays part of the graph."""
        anchors, parts = self._student.num_anchors, []
        ends = list(accumulate(anchors * scores.shape[2] * scores.shape[3] for scores in self.scores))
        starts = torch.tensor(ends[:-1], dtype=torch.int64).to(predictions.device, non_blocking=True)
        order = rows_of_each(torch.bucketize(predictions, starts, right=True), len(ends))
        priors = self._student.priors(self.regression)
        for level, (scores, start, rows) in enumerate(zip(self.scores, [0, *ends], order, strict=False)):
            image, local = images[rows], predictions[rows] - start
            cell, anchor = local // anchors, local % anchors
            of_class = scores.flatten(2).unflatten(1, (anchors, -1))[image, anchor, :, cell]  # [n, K]
            encoded = self.regression[level].flatten(2).unflatten(1, (anchors, -1))[image, anchor, :, cell]  # [n, E]
            boxes = self._student.decode(encoded, priors[level][local], self.strides[level])
            parts.append((self._embeddings(level, image, cell), of_class, anchor, boxes))
        embeddings, logits, anchor_index, boxes = (torch.cat(part) for part in zip(*parts, strict=True))
        logits = self._student.logits(logits.float())
        outputs = StudentOutputs(embeddings.float(), logits, anchors=anchor_index, boxes=boxes)
        return outputs.select(torch.cat(order).argsort())

    def _embeddings(self, level: int, image: Tensor, cell: Tensor) -> Tensor:
        """Features of the chosen branch on a level, Tensor[n, C]."""
        branch = self._student.branch
        of_branches = [
            features[level].flatten(2)[image, :, cell]
            for name, features in (("classification", self.classification), ("localization", self.localization))
            if branch in (name, "combined")
        ]
        return torch.stack(of_branches).sum(dim=0)
