"""Digests that say whether two things are the same, and lines that say how they differ."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdpipe.cache.errors import CacheError

_BLOCK = 1 << 24


def canonical_json(obj: Any) -> bytes:
    """One byte string per JSON value: sorted keys, no spaces, ASCII.

    Raises:
        CacheError: something in `obj` is not a JSON value (NaN and infinity are not).
    """
    try:
        return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"Identity and metadata of a cache must be JSON values (text, numbers, lists, mappings): {error}."
        ) from error


def digest_json(obj: Any) -> str:
    """sha256 of a JSON value in its canonical form, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(obj)).hexdigest()


def digest_tensors(state: Mapping[str, Tensor]) -> str:
    """sha256 of named tensors: of names, types, shapes and bytes, whatever the order, device or strides.

    Args:
        state: such as a `state_dict()`.

    Returns:
        64 hexadecimal digits.
    """
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]) + b"\n")
        flat = tensor.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(flat), _BLOCK):
            sha.update(flat[start : start + _BLOCK])
    return sha.hexdigest()


def digest_file(content: bytes) -> int:
    """Short identity of a file's bytes: 8 bytes of blake2b as a signed integer, and never 0, which stands for none."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True) or 1


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lines for people that name each entry in which two (nested) mappings differ.

    Args:
        found: what is there.
        wanted: what was asked for.

    Returns:
        Such as `["options.scale: found [1333, 800], wanted [640, 480]"]`; empty where both are equal.
    """
    found_leaves, wanted_leaves = _flatten(found), _flatten(wanted)
    return [
        f"{name}: found {found_leaves.get(name, 'nothing')}, wanted {wanted_leaves.get(name, 'nothing')}"
        for name in sorted(found_leaves.keys() | wanted_leaves.keys())
        if found_leaves.get(name) != wanted_leaves.get(name)
    ]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Leaves of a nested mapping as canonical JSON text under dotted names."""
    leaves: dict[str, str] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = json.dumps(json.loads(canonical_json(value)), sort_keys=True)
    return leaves
