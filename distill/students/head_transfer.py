"""Head transfer: the student gets the teacher's RPN and RoI head, to keep (G-DetKD, section 4.3.1) or to begin with."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.cache.errors import KdpipeError

_NAMED = 4


class HeadTransferError(KdpipeError):
    """The teacher's heads do not fit into the student."""


class HeadTransfer:
    """Copies the teacher's heads into a student; frozen, they get no gradient, and the statistics of norms stay.

    A parameter without gradient is touched neither by weight decay nor by momentum. A mask branch of the student, which
    the teacher says nothing of, is trained as always.

    Args:
        detector: mmdet two-stage detector.
        state: Weights of the teacher's RPN and RoI head by their names in its state dict.
        frozen: Whether the heads stay as they are, or learn on from there.

    Raises:
        HeadTransferError: What does not fit, with both shapes.
    """

    def __init__(self, detector: Any, state: Mapping[str, Tensor], frozen: bool = True) -> None:
        self._parts: dict[str, nn.Module] = dict(_heads(detector))
        self._state = state
        of_student = {
            f"{name}.{key}": value for name, part in self._parts.items() for key, value in part.state_dict().items()
        }
        wrong = [
            f"{name}: {_shape(state.get(name))} in the teacher, {_shape(of_student.get(name))} in the student"
            for name in sorted(of_student.keys() | state.keys())
            if _shape(state.get(name)) != _shape(of_student.get(name))
        ]
        if wrong:
            more = f"\n  and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise HeadTransferError(
                f"Head transfer ({'ht' if frozen else 'inherit'}) needs a student whose RPN and RoI head are built as "
                "the teacher's:\n  "
                + "\n  ".join(wrong[:_NAMED])
                + more
                + "\nGive the student the teacher's channels of the pyramid, anchors and width of the head, or leave "
                "it out of --methods."
            )
        self._frozen = frozen
        if frozen:
            for part in self._parts.values():
                part.requires_grad_(False)

    @torch.no_grad()
    def copy(self) -> None:
        """Put the teacher's weights in place, whatever is there."""
        for name, part in self._parts.items():
            for key, value in part.state_dict().items():
                value.copy_(self._state[f"{name}.{key}"])

    def keep(self) -> None:
        """Leave the training mode in frozen heads, so that statistics of norms do not change."""
        for part in self._parts.values() if self._frozen else ():
            part.eval()


def _heads(detector: Any) -> Iterator[tuple[str, nn.Module]]:
    """The RPN and what the RoI head is made of, masks left out, by their names in the detector."""
    yield "rpn_head", detector.rpn_head
    for name, part in detector.roi_head.named_children():
        if "mask" not in name:
            yield f"roi_head.{name}", part


def _shape(value: Tensor | None) -> str:
    return "absent" if value is None else str(list(value.shape))
