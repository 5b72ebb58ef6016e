"""Errors that are shown to the user as one message."""

from typing import TypeVar

_T = TypeVar("_T")


class KdpipeError(Exception):
    """Base of all errors that a user can act on.

    The message says what was wrong, what was found, what was expected and what to do.
    """


class CacheError(KdpipeError):
    """A cache is missing, incomplete, corrupt, or does not fit what was asked of it."""


def present(value: _T | None, name: str) -> _T:
    """A value that is there wherever its owner keeps its word.

    Raises:
        KdpipeError: It is None; `name` says which.
    """
    if value is None:
        raise KdpipeError(f"{name}: expected here, and not there.")
    return value
