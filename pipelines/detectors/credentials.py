"""Passwords and keys in texts that are kept or shown."""

import re

__all__ = ["masked"]

_IN_ADDRESS = re.compile(r"""(?<=://)(?:[^/\s'"\\@]+|[^/\s'"\\@:]*:(?!\d+/)[^\s'"\\]*)@""")
_KEYS = "secret|access|api|account|private|shared|storage|encryption|signing|auth|wandb"
_TOKENS = "access|api|auth|hf|sas|session|security|refresh|bearer|bot|slack|github|gitlab|wandb"
_NAMES = (
    rf"(?:\w+_)?(?:password|passwd|passphrase|secret|credentials?|(?:{_KEYS})_key(?:_id)?|apikey|(?:{_TOKENS})_token)"
    r"|(?:proxy-)?authorization|x-api-key|token"
)
_BY_NAME = re.compile(rf"""(\b(?:{_NAMES})['"]?\s*[=:]\s*)(['"])(?:\\.|(?!\2)[^\\\n])+\2""", re.IGNORECASE)
_IN_QUERY = re.compile(
    r"""([?&](?:sig|signature|token|key|password|secret|x-amz-(?:signature|credential|security-token)|x-goog-signature"""
    rf"""|(?:{_KEYS})_key|(?:{_TOKENS})_token)=)[^&\s'"\\]+""",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """A text with `***` in place of its credentials.

    These are what stands before the host of an address (`https://user:password@host`), what signs it behind
    (`?sig=...`), and quoted values of names such as `password`, `api_key`, `access_token` and `Authorization`.
    """
    return _BY_NAME.sub(r"\1\2***\2", _IN_QUERY.sub(r"\1***", _IN_ADDRESS.sub("***@", text)))
