"""Building what a config describes; mistakes in the config are told as such."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.detectors.literal_config import ConfigError

__all__ = ["building", "missing_package"]


@contextmanager
def building(subject: str) -> Iterator[None]:
    """Turn what a config's mistakes raise while it is built into a `ConfigError`.

    A config can name any class with any arguments, so it may raise anything. Errors of kdpipe, of files and of the
    machine say enough.

    Args:
        subject: Is built, as the subject of a sentence.
    """
    try:
        yield
    except (KdpipeError, OSError, MemoryError, UnicodeEncodeError):
        raise
    except Exception as error:
        if package := missing_package(error):
            raise ConfigError(
                f"{subject} needs the package {package}, which is not installed: pip install {package}"
            ) from error
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
        raise ConfigError(
            f"{subject} cannot be built from its config ({type(error).__name__}): {reason}\n"
            "Check the config and its overrides; kdpipe --debug shows where it happened."
        ) from error


def missing_package(error: BaseException | None) -> str:
    """The package that an error, or one that led to it, is missing; empty where none is."""
    while error is not None:
        names = re.findall(r"'?(\w+) is not installed|'(\w+)\.\w+ is not in the .* registry", str(error))
        packages: list[str] = [name for pair in names for name in pair if name]
        if isinstance(error, ModuleNotFoundError) and error.name:
            packages.insert(0, error.name)
        for name in packages:
            if find_spec(package := name.partition(".")[0]) is None:
                return package
        error = error.__cause__ or error.__context__
    return ""
