"""Keys, region and endpoint of a profile in the shared configuration files of AWS, which obstore does not read."""

import configparser
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.cache.errors import CacheError

_OPTIONS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}
_KEYS = ("access_key_id", "secret_access_key", "session_token")
# Profiles whose keys have to be asked for, which is the business of AWS's own SDK.
_NEEDS_BOTO3 = ("role_arn", "sso_session", "sso_start_url", "credential_process", "login_session")


def complete_options(options: Mapping[str, str]) -> tuple[dict[str, str], Any]:
    """The options of an S3 store with what environment variables do not set, and the profile does.

    Args:
        options: of the user, which go before environment variables, and these before the profile.

    Returns:
        The options, and a provider of credentials for obstore (None: none is needed).

    Raises:
        CacheError: AWS_PROFILE names a profile that is not there, or one that needs boto3, which is not installed.
    """
    variables = [name for name in os.environ if name.startswith("AWS_")]
    set_options = {name.lower().removeprefix("aws_") for name in (*options, *variables)}
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    profile = _read(name or "default")
    if name and not profile:
        raise CacheError(
            f"AWS_PROFILE names the profile {name!r}, which is in none of {', '.join(map(str, _files()))}: correct it."
        )
    settings = {option: profile[key] for key, option in _OPTIONS.items() if key in profile}
    if set_options & {"region", "default_region"}:
        settings.pop("region", None)
    if set_options & {"endpoint", "endpoint_url", "endpoint_url_s3"}:
        settings.pop("endpoint", None)
    provider = None
    if set_options & {"access_key_id", "skip_signature", "web_identity_token_file"}:
        settings = {name: value for name, value in settings.items() if name not in _KEYS}
    elif "access_key_id" not in settings and any(name in profile for name in _NEEDS_BOTO3):
        provider = _boto3(name or "default")
    return {**settings, **options}, provider


def _files() -> list[Path]:
    files = (("AWS_CONFIG_FILE", "~/.aws/config"), ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
    return [Path(os.environ.get(variable, default)).expanduser() for variable, default in files]


def _read(name: str) -> dict[str, str]:
    """The settings of a profile; those in the file of credentials go first."""
    settings: dict[str, str] = {}
    for file in _files():
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):  # its message may quote a line with a key
            raise CacheError(f"The file {file} cannot be read as a configuration of AWS: correct it.") from None
        for section in (f"profile {name}", name):
            if parser.has_section(section):
                settings |= dict(parser.items(section))
    return settings


def _boto3(profile: str) -> Any:
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise CacheError(
            f"The AWS profile {profile!r} has no keys of its own (SSO, a role, or a process gives them), for which "
            "boto3 is needed: pip install kdpipe[aws], or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from None
    return Boto3CredentialProvider(boto3.Session(profile_name=profile))
