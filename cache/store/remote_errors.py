"""What the errors of object stores mean. They name URLs with signatures and quote answers: only parts are repeated."""

import re

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

_STATUS = re.compile(r"status code: (\d{3})[^:\n]*|Client error with status (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>|\"code\": \"?(\w{1,60})|x-ms-error-code: (\w{1,60})")
_CAUSE = re.compile(r"message: \"([^\"]{1,100})\"|error: \"([^\"]{1,100})\"")
_REGION = re.compile(r"<Region>([\w-]{1,40})</Region>|expecting '([\w-]{1,40})'")
_NO_BUCKET = ("NoSuchBucket", "The specified bucket does not exist", "ContainerNotFound")
# Where obstore asks for credentials when nobody gives any: the services of virtual machines and containers.
_METADATA = (
    "169.254.169.254",
    "169.254.170.2",
    "fd00:ec2::254",
    "metadata.google.internal",
    "/metadata/identity",
    "/latest/api/token",
)
_BEYOND_END = ("NotPartial", "StartTooLarge")  # an empty object is given whole
_OTHER_REGION = (
    "incorrectly configured region",
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "IllegalLocationConstraint",
)
_WRONG_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "RequestTimeTooSkewed",
    "AuthenticationFailed",
)


def is_temporary(error: BaseError) -> bool:
    """Whether the same request may be answered later: the store is busy, or away."""
    text = str(error)
    status = _status(text)
    if status is not None:
        return (status >= 500 and status != 501) or status in (408, 429)
    return "HTTP error" in text and "builder error" not in text


def is_no_bucket(error: Exception) -> bool:
    """Whether it is the bucket that is not there, not an object in it."""
    return any(mark in str(error) for mark in _NO_BUCKET)


def is_beyond_end(error: Exception) -> bool:
    """Whether a range was asked for that lies behind the end of the object."""
    text = str(error)
    return _status(text) == 416 or any(mark in text for mark in _BEYOND_END)


def reason(error: Exception) -> str:
    """A few words on an error, without URLs and without what a server may have quoted."""
    text = str(error)
    code = next((group for match in _CODE.finditer(text) for group in match.groups() if group), None)
    if match := _STATUS.search(text):
        status = match[0].removeprefix("status code: ").removeprefix("Client error with status ").strip()
        return f"it answers {status}" + (f" ({code})" if code else "")
    if "HTTP error" in text:
        cause = [next(group for group in match.groups() if group) for match in _CAUSE.finditer(text)]
        if "TimedOut" in text:
            cause = ["it does not answer in time"]
        return "it cannot be reached" + (f" ({cause[-1]})" if cause else "")
    return re.sub(r"\w+://\S+", "...", text.splitlines()[0][:200]).rstrip(". ")


def advice(error: Exception, place: str) -> str:
    """What is wrong and what to do, as sentences; `place` is the URL of the cache."""
    text = str(error)
    if is_no_bucket(error):
        return (
            f"There is no such bucket: {place}. Check its name, and the endpoint (AWS_ENDPOINT_URL or --store-option "
            "endpoint=...) and the account that it is looked for at"
        )
    if any(mark in text for mark in _METADATA):
        return (
            f"There are no credentials for {place}. Set them in the environment (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY), or give "
            "--store-option skip_signature=true where everybody may read"
        )
    if any(mark in text for mark in _OTHER_REGION):
        region = next((group for match in _REGION.finditer(text) for group in match.groups() if group), None)
        return (
            f"The bucket of {place} lies in another region{f', {region}' if region else ''}: set AWS_REGION or "
            f"--store-option region={region or '...'}"
        )
    if isinstance(error, UnauthenticatedError) or any(mark in text for mark in _WRONG_CREDENTIALS):
        return (
            f"The credentials for {place} are not accepted: {reason(error)}. Check keys and token, whether they have "
            "expired, and the clock of this machine"
        )
    if isinstance(error, PermissionDeniedError):
        return (
            f"{place} must not be read or written with these credentials: {reason(error)}. Reading needs the right to "
            "get and list objects, writing that to put them, --repair that to delete them"
        )
    if _status(text) == 501:
        return (
            f"{place} cannot put an object only where none is ({reason(error)}), which kdpipe relies on: use a newer "
            "server, or a folder"
        )
    if isinstance(error, BaseError) and is_temporary(error):
        return (
            f"{place}: {reason(error)}, also after several attempts. Check the network, the endpoint "
            "(AWS_ENDPOINT_URL, --store-option endpoint=...) and the server. What was committed before is intact: run "
            "the same command again"
        )
    return f"{place}: {reason(error)}"


def _status(text: str) -> int | None:
    match = _STATUS.search(text)
    return int(match[1] or match[2]) if match else None
