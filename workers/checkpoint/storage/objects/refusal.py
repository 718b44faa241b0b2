"""What a request has failed of, in words for the user: from the client's error and the store's answer."""

from __future__ import annotations

import errno
import re

from stager.workers.errors import StorageError

_CODE = re.compile(r"<Code>([^<]+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]+)</Message>")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_NOT_ALLOWED = (
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "AuthenticationFailed",
    "AuthorizationFailure",
)
_ASKED_FOR_A_ROLE = ("169.254.169.254", "metadata.google.internal")
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles in ~/.aws are not read)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def first_line(error: BaseException) -> str:
    """Return what an error of the client says, without the dump behind it."""
    text = str(error).partition("Debug source")[0].strip()
    return text.splitlines()[0] if text else type(error).__name__


def refusal(action: str, url: str, server: str, error: BaseException, *, is_denied: bool) -> StorageError:
    """Return the error that says why a request has failed, and what to do.

    Args:
        action: what was asked for.
        server: the endpoint that the environment names; "": the service's own.
        error: of the client.
        is_denied: the client takes it for one of credentials or rights.
    """
    text = str(error)
    code, message = _CODE.search(text), _MESSAGE.search(text)
    name = "" if code is None else code[1]
    reason = f"the store says {name}: {message[1] if message else ''}" if code else first_line(error)
    scheme = url.partition(":")[0]
    if any(address in text for address in _ASKED_FOR_A_ROLE):
        return StorageError(
            errno.EACCES,
            f"cannot {action}: no credentials were found, and this machine has no role; set {_KEYS[scheme]}",
            url,
        )
    if name in _NO_BUCKET:
        return StorageError(
            errno.ENOENT, f"cannot {action}: {reason}; create the bucket, or correct its name in the URL", url
        )
    if is_denied or name in _NOT_ALLOWED or "403 Forbidden" in text or "401 Unauthorized" in text:
        return StorageError(
            errno.EACCES,
            f"cannot {action}: {reason}; check the credentials ({_KEYS[scheme]}), and that they allow to list, get, put and "
            "delete below this URL",
            url,
        )
    where = f"that {server} is the store's address and answers" if server else "the network, and the name of the bucket"
    return StorageError(errno.EIO, f"cannot {action}: {reason}; check {where}", url)
