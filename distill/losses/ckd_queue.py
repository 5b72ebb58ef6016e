"""What CKD compares a student's box with: the teacher's embeddings of boxes, of all ranks and of earlier steps."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdpipe.distill.losses.numeric import LossInputError, check_shape, no_autocast

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class TeacherKeys:
    """What the teacher says of N boxes, and which boxes these are.

    Attributes:
        embeddings: Tensor[N, D], input of the teacher's classifier layer.
        boxes: Tensor[N, 4] float32 (x1, y1, x2, y2), pixels of the original image, whatever the student's view of it.
        image_ids: Tensor[N] int64.
    """

    embeddings: Tensor
    boxes: Tensor
    image_ids: Tensor

    def __getitem__(self, rows: slice | Tensor) -> "TeacherKeys":
        """Those of a slice, a mask, or of row numbers."""
        return TeacherKeys(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def join(parts: Sequence["TeacherKeys"]) -> "TeacherKeys":
        """All of several, in their order; float16 beside float32 becomes that."""
        with no_autocast(parts[0].boxes):  # autocast knows no float64
            columns = [torch.cat([getattr(part, field.name) for part in parts]) for field in fields(TeacherKeys)]
        return TeacherKeys(*columns)


class TeacherQueue(nn.Module):
    """The last embeddings that the teacher gave on all ranks, oldest out first. Part of the state dict.

    A checkpoint of a queue of another size, as it has with other ranks or another batch, gives the newest that fit in.
    Memory: 2 D + 24 bytes for each, 85 MB for 40,960 of length 1,024.

    Args:
        dim: length D of an embedding.
        size: how many are kept.

    Raises:
        LossInputError: `dim` or `size` is not positive.
    """

    embeddings: Tensor
    boxes: Tensor
    image_ids: Tensor
    count: Tensor
    cursor: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        if dim < 1 or size < 1:
            raise LossInputError(f"A queue needs a positive dim and size, found {dim} and {size}.")
        self.register_buffer("embeddings", torch.zeros(size, dim, dtype=torch.float16))
        self.register_buffer("boxes", torch.zeros(size, 4))
        self.register_buffer("image_ids", torch.zeros(size, dtype=torch.int64))
        for name in ("count", "cursor"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self._held: int | None = 0  # `count`, for which no device is waited for; None where it is not known

    @torch.no_grad()
    def push(self, new: TeacherKeys) -> None:
        """Add what the teacher says of some boxes: on every rank the same, as `of_all_ranks` gives it.

        Embeddings are kept in float16; what that cannot hold becomes the largest number that it can.

        Args:
            new: on the device of the queue.

        Raises:
            LossInputError: the length of the embeddings is not `dim`.
        """
        size, dim = self.embeddings.shape
        check_shape("embeddings", new.embeddings, (len(new.boxes), dim), f"a queue of dim {dim}")
        new = new[-size:]
        count = len(new.boxes)
        rows = (self.cursor + torch.arange(count, device=self.cursor.device)) % size
        for field in fields(TeacherKeys):
            values = getattr(new, field.name)
            values = values.clamp(-_LARGEST, _LARGEST) if field.name == "embeddings" else values
            getattr(self, field.name)[rows] = values.to(getattr(self, field.name))
        self.cursor.copy_((self.cursor + count) % size)
        self.count.copy_((self.count + count).clamp(max=size))
        self._held = None if self._held is None else min(self._held + count, size)

    def keys(self) -> TeacherKeys:
        """What the queue holds, from 0 to its size, in no particular order. Shares its memory."""
        if self._held is None:
            self._held = int(self.count)
        return TeacherKeys(*(getattr(self, field.name) for field in fields(TeacherKeys)))[: self._held]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if f"{prefix}reps" in state_dict:
            logging.getLogger("kdpipe").warning(
                "The checkpoint is of an older kdpipe, whose queue of ckd held projections of earlier steps: it begins "
                "empty, and fills within as many steps as it holds."
            )
            for name in ("reps", "count", "cursor"):
                state_dict.pop(f"{prefix}{name}", None)
            state_dict |= {f"{prefix}{name}": torch.zeros_like(buffer) for name, buffer in self.named_buffers()}
        stored = state_dict.get(f"{prefix}embeddings")
        if stored is not None and len(stored) != len(self.embeddings):
            self._fit(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)
        self._held = None

    def _fit(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace a queue of another size by its newest that fit into this one, oldest first."""
        count, cursor = (int(state_dict[f"{prefix}{name}"]) for name in ("count", "cursor"))
        size, stored = len(self.embeddings), len(state_dict[f"{prefix}embeddings"])
        rows = (torch.arange(cursor - count, cursor) % stored)[-size:]
        for field in fields(TeacherKeys):
            values = state_dict[f"{prefix}{field.name}"]
            fitted = values.new_zeros(size, *values.shape[1:])
            fitted[: len(rows)] = values[rows.to(values.device)]
            state_dict[f"{prefix}{field.name}"] = fitted
        state_dict[f"{prefix}count"] = torch.tensor(len(rows))
        state_dict[f"{prefix}cursor"] = torch.tensor(len(rows) % size)


@torch.no_grad()
def of_all_ranks(own: TeacherKeys) -> tuple[TeacherKeys, TeacherKeys]:
    """What the teacher says of the boxes of this step on all ranks, of which there may be different numbers.

    The embeddings are constants, so that no gradient has to be sent: each rank learns from its own loss, and the mean
    over ranks of these gradients is that of the mean loss.

    Args:
        own: Of this rank. Every rank must call this equally often; a rank may have none.

    Returns:
        That of the other ranks, with embeddings in float16; and that of every rank, in the order of ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return own[:0], own
    with no_autocast(own.boxes):  # which has no way to join float64
        device = own.boxes.device
        count = torch.full((1,), len(own.boxes), device=device)
        counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, count)
        lengths = torch.cat(counts).tolist()  # the one time that the device is waited for
        half = own.embeddings.clamp(-_LARGEST, _LARGEST).half()
        # a float64 holds pixels of float32 and whole numbers up to 2^53: one message for both
        places = torch.cat([own.boxes.double(), own.image_ids[:, None].double()], dim=1)
        embeddings, places = _gather(half, lengths), _gather(places, lengths)
        every = TeacherKeys(embeddings, places[:, :4].float(), places[:, 4].long())
    start = sum(lengths[: dist.get_rank()])
    return TeacherKeys.join([every[:start], every[start + len(own.boxes) :]]), every


def _gather(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows of all ranks, Tensor[N, d] -> Tensor[sum of lengths, d]."""
    padded = rows.new_zeros(max(lengths), rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])
