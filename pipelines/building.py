"""Building what a config describes; mistakes in the config are told as such."""

from collections.abc import Iterator
from contextlib import contextmanager

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.literals import ConfigError

__all__ = ["building"]


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn what a config's mistakes raise while it is built into a `ConfigError`.

    A config can name any class with any arguments, so it may raise anything. Errors of kdpipe and of files say enough.

    Args:
        what: Is built, as the subject of a sentence.
    """
    try:
        yield
    except (KdpipeError, OSError):
        raise
    except Exception as error:
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
        raise ConfigError(
            f"{what} cannot be built from its config ({type(error).__name__}): {reason}\n"
            "Check the config and its overrides; kdpipe --debug shows where it happened."
        ) from error
