"""Passwords and keys in texts that are kept or shown."""

import re

__all__ = ["masked"]

_IN_ADDRESS = re.compile(r"(?<=://)[^/\s'\"\\@]+@")
_NAMES = (
    r"(?:\w+_)?(?:password|passwd|secret|(?:secret|access|api)_key(?:_id)?|apikey|(?:access|api|auth|hf)_token)|token"
)
_BY_NAME = re.compile(rf"""(\b(?:{_NAMES})['"]?\s*[=:]\s*)(['"])(?:\\.|(?!\2)[^\\\n])+\2""", re.IGNORECASE)


def masked(text: str) -> str:
    """A text with `***` in place of its credentials.

    These are what stands before the host of an address (`https://user:password@host`), and quoted values of names such
    as `password`, `api_key` and `access_token`.
    """
    return _BY_NAME.sub(r"\1\2***\2", _IN_ADDRESS.sub("***@", text))
