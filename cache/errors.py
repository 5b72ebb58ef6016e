"""Errors that are shown to the user as one message."""


class KdpipeError(Exception):
    """Base of all errors that a user can act on.

    The message says what was wrong, what was found, what was expected and what to do.
    """


class CacheError(KdpipeError):
    """A cache is missing, incomplete, corrupt, or does not fit what was asked of it."""
