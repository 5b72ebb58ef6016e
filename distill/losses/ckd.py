"""Contrastive distillation: the student's view of a box should find the teacher's among those of many others."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchvision.ops import box_iou

from kdpipe.distill.losses.numeric import LossInputError, check_dims, check_shape, full_precision, no_autocast

# Similarities held at a time: 64 MiB of float32, whatever the batch and the queue.
_SLICE_ELEMENTS = 2**24


def ckd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    queue: Tensor | None = None,
    exclude: Tensor | None = None,
    temperature: float = 0.07,
) -> Tensor:
    """InfoNCE between projected representations of the same boxes (G-DetKD, eq. 2).

    -1/N sum_i log(g(s_i, t_i) / sum_j g(s_i, t_j)) with g = exp(cosine similarity / temperature). j runs over the
    batch, the positive i included, and over the queue. Gradients go to `student` and to `teacher`: f_theta, which made
    both, is learned from either side; detach `teacher` where that is not wanted. The queue gets none. The N x (N + M)
    similarities are never held whole, neither forward nor backward. Differentiable once. Computed in float32 (float64
    for float64 input), autocast or not.

    The paper is silent about the temperature; 0.07 is that of CRD and MoCo.

    Args:
        student: Tensor[N, d], need not be normalised.
        teacher: Tensor[N, d] of the same boxes.
        queue: Tensor[M, d], teacher representations of other boxes: more negatives.
        exclude: Tensor[N, N] bool, True where teacher j is not a negative of student i. Its diagonal is ignored: the
            positive always counts.
        temperature: gamma > 0.

    Returns:
        Scalar >= 0; 0 for N = 0, still part of the graph.

    Raises:
        LossInputError: shapes that do not fit, `exclude` is not bool, or the temperature is not positive.
    """
    check_dims("student", student, "[N, d]")
    num_rois, dim = student.shape
    fit = f"student {list(student.shape)}"
    check_shape("teacher", teacher, (num_rois, dim), fit)
    if queue is not None:
        check_dims("queue", queue, "[M, d]")
        check_shape("queue", queue, (queue.shape[0], dim), fit)
    if exclude is not None:
        check_shape("exclude", exclude, (num_rois, num_rois), fit)
        if exclude.dtype != torch.bool:
            raise LossInputError(f"exclude must be bool, found {exclude.dtype}.")
    if temperature <= 0:
        raise LossInputError(f"The temperature of CKD must be above 0, found {temperature}.")
    with no_autocast(student):
        student, teacher = full_precision(student, teacher)
        negatives = student.new_empty(0, dim) if queue is None else queue.detach().to(student)
        loss: Tensor = _InfoNCE.apply(_unit(student) / temperature, _unit(teacher), _unit(negatives), exclude)
    return loss


class _InfoNCE(torch.autograd.Function):
    """Mean over rows of logsumexp(queries @ keys^T) minus the positive, with its gradient made in the same pass."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, negatives: Tensor, exclude: Tensor | None) -> Tensor:
        num_rows = queries.shape[0]
        all_keys = torch.cat([keys, negatives])  # [N + M, d]
        query_grad, key_grad = torch.zeros_like(queries), torch.zeros_like(keys)
        loss = queries.new_zeros(())
        step = max(_SLICE_ELEMENTS // max(all_keys.shape[0], 1), 1)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            similarity = queries[rows] @ all_keys.T  # [n, N + M]; row i has its positive in column start + i
            positive = similarity.diagonal(start).clone()
            if exclude is not None:
                similarity[:, :num_rows].masked_fill_(exclude[rows], -torch.inf)
                similarity.diagonal(start).copy_(positive)
            peak = similarity.amax(dim=1, keepdim=True)
            total = similarity.sub_(peak).exp_().sum(dim=1, keepdim=True)
            loss += ((total.log() + peak).squeeze(1) - positive).sum()
            slope = similarity.div_(total)  # softmax, then minus 1 at the positive: d loss / d similarity
            slope.diagonal(start).sub_(1.0)
            query_grad[rows] = slope @ all_keys
            key_grad += slope[:, :num_rows].T @ queries[rows]
        count = max(num_rows, 1)
        ctx.save_for_backward(query_grad / count, key_grad / count)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query_grad, key_grad = ctx.saved_tensors
        return grad * query_grad, grad * key_grad, None, None


def _unit(vectors: Tensor) -> Tensor:
    """Rows of length 1. Rows of zeros stay zero, with no gradient; huge and tiny rows neither overflow nor vanish."""
    peak = vectors.detach().abs().amax(dim=1, keepdim=True)
    zero = peak == 0
    unit: Tensor = functional.normalize(vectors / peak.masked_fill(zero, 1.0), dim=1)
    return unit.masked_fill(zero, 0.0)


def exclude_pairs(boxes: Tensor, image_index: Tensor, iou: float = 0.5) -> Tensor:
    """Pairs of boxes that show the same thing: same image and IoU > `iou`. They are no negatives of each other.

    Args:
        boxes: Tensor[N, 4] (x1, y1, x2, y2), the boxes of one image in one frame.
        image_index: Tensor[N], which image of the batch a box is in.
        iou: threshold in [0, 1]; 0.5 is the best one of the paper's table 10.

    Returns:
        Tensor[N, N] bool, symmetric.

    Raises:
        LossInputError: shapes that do not fit.
    """
    check_shape("boxes", boxes, (image_index.numel(), 4), f"image_index {list(image_index.shape)}")
    (boxes,) = full_precision(boxes)
    exclude = torch.zeros(boxes.shape[0], boxes.shape[0], dtype=torch.bool, device=boxes.device)
    for image in set(image_index.tolist()):
        rows = (image_index == image).nonzero().squeeze(1)
        exclude[rows[:, None], rows] = box_iou(boxes[rows], boxes[rows]) > iou
    return exclude


class ContrastiveQueue(nn.Module):
    """The last representations that the teacher gave on all ranks, oldest out first. Part of the state dict.

    Args:
        dim: length of a representation.
        size: how many are kept.

    Raises:
        LossInputError: `dim` or `size` is not positive.
    """

    reps: Tensor
    count: Tensor
    cursor: Tensor

    def __init__(self, dim: int, size: int = 80 * 1024) -> None:
        super().__init__()
        if dim < 1 or size < 1:
            raise LossInputError(f"A queue needs a positive dim and size, found {dim} and {size}.")
        self.register_buffer("reps", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, reps: Tensor) -> None:
        """Add representations, those of every rank in the order of ranks where torch.distributed is initialised.

        Every rank must call this equally often; a rank may give no representations.

        Args:
            reps: Tensor[N, dim] on the device of the queue.

        Raises:
            LossInputError: the length of the representations is not `dim`.
        """
        size, dim = self.reps.shape
        check_dims("reps", reps, "[N, dim]")
        check_shape("reps", reps, (reps.shape[0], dim), f"a queue of dim {dim}")
        new = _gather(reps.detach().to(self.reps))
        kept = new[-size:]
        rows = (self.cursor + torch.arange(kept.shape[0], device=kept.device)) % size
        self.reps[rows] = kept
        self.cursor.copy_((self.cursor + kept.shape[0]) % size)
        self.count.copy_((self.count + kept.shape[0]).clamp(max=size))

    def negatives(self) -> Tensor:
        """What the queue holds, Tensor[M, dim] with M from 0 to its size, in no particular order. Shares its memory."""
        return self.reps[: int(self.count)]


def _gather(rows: Tensor) -> Tensor:
    """Rows of all ranks, Tensor[N, d] -> Tensor[sum of N, d]; N may differ between ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    lengths = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(lengths), rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])


class CKD(nn.Module):
    """Parameters of CKD: f_theta, shared by both sides, and the queue. Needed in training only.

    A student whose embeddings have another length than the teacher's is lifted to it by one linear layer, so that
    f_theta stays shared. Where an embedding is of a location with several anchors, that layer makes a representation of
    each of them, so that boxes of one location differ (section 4.3.2, "decoupled for each anchor"). The teacher's
    embeddings are constants; f_theta learns from both sides of the batch (see `ckd_loss`). Negatives of the current
    step are those of this rank; those of the other ranks come through the queue.

    Args:
        student_dim: length of the student's embeddings.
        teacher_dim: length of the teacher's embeddings.
        dim: length of the projected representations.
        queue_size: how many of the teacher's are kept as negatives; the paper's 80 x 1024.
        temperature: gamma > 0.
        anchors: boxes A that one of the student's embeddings stands for.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        dim: int = 128,
        queue_size: int = 80 * 1024,
        temperature: float = 0.07,
        anchors: int = 1,
    ) -> None:
        super().__init__()
        lifted = student_dim != teacher_dim or anchors > 1
        self.lift = nn.Linear(student_dim, anchors * teacher_dim) if lifted else nn.Identity()
        self.f_theta = nn.Linear(teacher_dim, dim)
        self.queue = ContrastiveQueue(dim, queue_size)
        self.student_dim = student_dim
        self.temperature = temperature
        self.anchors = anchors

    def forward(
        self,
        student_embeddings: Tensor,
        teacher_embeddings: Tensor,
        exclude: Tensor | None = None,
        anchors: Tensor | None = None,
    ) -> Tensor:
        """The loss of `ckd_loss` after projection. In training mode, the teacher's side then joins the queue.

        Args:
            student_embeddings: Tensor[N, student_dim].
            teacher_embeddings: Tensor[N, teacher_dim] of the same boxes; gets no gradient.
            exclude: Tensor[N, N] bool, pairs that are not negatives (`exclude_pairs`).
            anchors: Tensor[N] int64 in [0, A), which anchor of its location each box is of. Needed where A > 1.

        Returns:
            Scalar.

        Raises:
            LossInputError: shapes that do not fit.
        """
        num_rois = student_embeddings.shape[0]
        for name, found, dim in (
            ("student_embeddings", student_embeddings, self.student_dim),
            ("teacher_embeddings", teacher_embeddings, self.f_theta.in_features),
        ):
            check_shape(name, found, (num_rois, dim), f"{num_rois} student embeddings and a length of {dim}")
        dtype = self.f_theta.weight.dtype
        with no_autocast(student_embeddings):
            student = self.f_theta(self.lifted(student_embeddings.to(dtype), anchors))  # [N, dim]
            teacher = self.f_theta(teacher_embeddings.detach().to(dtype))  # [N, dim]
        loss = ckd_loss(student, teacher, queue=self.queue.negatives(), exclude=exclude, temperature=self.temperature)
        if self.training:
            self.queue.push(_unit(teacher.detach()))
        return loss

    def lifted(self, embeddings: Tensor, anchors: Tensor | None = None) -> Tensor:
        """The student's embeddings in the teacher's dimension, each by the slice of the layer that is its anchor's.

        The slices are applied to their own rows only: a product with the whole layer would cost A times as much.

        Args:
            embeddings: Tensor[N, student_dim].
            anchors: Tensor[N] int64 in [0, A). Needed where A > 1.

        Returns:
            Tensor[N, teacher_dim].

        Raises:
            LossInputError: there are several anchors, and it is not said of which each row is.
        """
        if self.anchors == 1:
            lifted: Tensor = self.lift(embeddings)
            return lifted
        if anchors is None or anchors.shape != embeddings.shape[:1]:
            raise LossInputError(
                f"The embeddings {list(embeddings.shape)} stand for {self.anchors} anchors each: expected anchors "
                f"[{len(embeddings)}], found {None if anchors is None else list(anchors.shape)}."
            )
        weight, bias = (getattr(self.lift, name).unflatten(0, (self.anchors, -1)) for name in ("weight", "bias"))
        rows = [(anchors == anchor).nonzero().squeeze(1) for anchor in range(self.anchors)]
        parts = [functional.linear(embeddings[of], w, b) for of, w, b in zip(rows, weight, bias, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]
