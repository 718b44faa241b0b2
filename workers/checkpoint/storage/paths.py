"""Paths as people write them: ``~/runs``, ``$SCRATCH/runs``, ``file:///data/runs``; and what looks like one and is none."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote

from stager.workers.errors import ArgumentError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# pathlib makes s3:/bucket of s3://bucket.
_COLLAPSED_URL = re.compile(
    r"(s3a?|gs|gcs|az|abfss?|wasbs?|adl|hdfs|webhdfs|https?|ftp|sftp|ssh|hf|oss|cos|dbfs|memory|file):/", re.IGNORECASE
)

_OBJECT_STORES = ("s3", "gs", "az")
_OTHER_NAMES = {"s3a": "s3", "gcs": "gs"}
_DOWNLOADED = ("http", "https", "ftp", "hf")

OBJECT_STORE_URL = re.compile(r"(s3|gs|az)://([^/?#@:]+)(?:/(.*))?", re.DOTALL)
"""The URL of something in an object store: scheme, bucket, and key or None."""
_ANY_CASE = re.compile(r"(s3|gs|az)://", re.IGNORECASE)
_MISTYPED = re.compile(r"(s3a?|gs|gcs|az)(:/?|//)(?!/)", re.IGNORECASE)  # s3:bucket/run, s3//bucket/run


def place_path(path: object, what: str = "directory", environ: Mapping[str, str] | None = None) -> str:
    """Return the absolute path, or the URL in an object store, that ``path`` means. Arguments as of :func:`local_path`.

    Raises:
        ArgumentError: as of :func:`local_path`; or a part of the URL's key is ``.`` or ``..``.
    """
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if isinstance(path, str) and (match := _ANY_CASE.match(path)) is not None:
        path = match[1].lower() + path[match.end(1) :]
    if isinstance(path, str) and (match := OBJECT_STORE_URL.fullmatch(path)) is not None:
        parts = [part for part in (match[3] or "").split("/") if part]
        if "." in parts or ".." in parts:
            raise ArgumentError(f"{what} is {path!r}; no part of a key in a bucket may be . or ..")
        if not path.isprintable():
            raise ArgumentError(f"{what} is {path!r}; a key in a bucket may have no control character")
        return "/".join((f"{match[1]}://{match[2]}", *parts))
    return local_path(path, what, environ)


def local_path(path: object, what: str = "directory", environ: Mapping[str, str] | None = None) -> str:
    """Return the absolute path that ``path`` means: ``~`` and ``$VAR`` are expanded.

    A path in which ``$`` is a letter is taken as it is if something is there.

    Args:
        path: text, bytes or a path-like object; a URL ``file:///...`` is taken, too.
        what: the argument's name, for the message.
        environ: the variables; None: ``os.environ``.

    Raises:
        ArgumentError: it is no path, is empty, is a URL of another scheme, or names an unknown variable or user.
    """
    text = _text(path, what)
    match = _URL.match(text) or _COLLAPSED_URL.match(text)
    if match is not None:
        text = _of_url(match, text, what)
    elif (match := _MISTYPED.match(text)) is not None and not os.path.lexists(text):
        meant = f"{match[1].lower()}://{text[match.end() :]}"
        raise ArgumentError(
            f"{what} is {text!r}, which is neither a path here nor a URL; write {meant!r}, or './{text}'"
        )
    if "$" in text and not os.path.lexists(text):
        text = _expand_variables(text, what, os.environ if environ is None else environ)
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        if expanded == text:
            raise ArgumentError(
                f"{what} is {text!r}, and there is no user of that name; write ./{text} for a name with ~"
            )
        text = expanded
    try:
        return os.path.abspath(text)
    except FileNotFoundError as error:
        raise ArgumentError(
            f"{what} is {text!r}, and the current directory of this process was removed; give an absolute path"
        ) from error


def _text(path: object, what: str) -> str:
    if not isinstance(path, str | bytes | os.PathLike):
        got = f"{path!r:.100} ({type(path).__name__})"
        raise ArgumentError(f"{what} must be text or a pathlib.Path, got {got}{_advice(path)}")
    text = os.fsdecode(path)
    if not text.strip():
        raise ArgumentError(f"{what} is an empty path; write '.' for the current directory")
    if "\0" in text:
        raise ArgumentError(f"{what} is {text!r}, which has a null character in it")
    return text


def _advice(path: object) -> str:
    if type(path) is not int:
        return ""
    return f'; a step is given to save() or load(), as in Checkpointer("runs/gpt", read_only=True).load({path})'


def _of_url(match: re.Match[str], text: str, what: str) -> str:
    scheme = match[1].lower()
    rest = text[match.end() :]
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if match[0].endswith("://") and slash and host in ("", "localhost"):
            return unquote(f"/{path}")
        raise ArgumentError(
            f"{what} is {text!r}, which names no file of this host; write file:///path, or the path itself"
        )
    raise ArgumentError(f"{what} is {text!r}, and {_why_not(scheme, match[0], rest)}")


def _why_not(scheme: str, beginning: str, rest: str) -> str:
    """Say why a URL is not taken, and what to give instead."""
    if scheme in _OBJECT_STORES and not beginning.endswith("://"):
        return f"a slash is missing (pathlib takes one away); give text, {f'{scheme}://{rest}'!r}"
    if scheme in _OBJECT_STORES and not rest.strip("/"):
        return f"names no bucket; write '{scheme}://bucket/run'"
    if scheme in _OBJECT_STORES and OBJECT_STORE_URL.fullmatch(f"{scheme}://{rest}") is None:
        return f"no bucket has this name; write '{scheme}://bucket/run'; credentials and endpoint come from the environment"
    if scheme in _OBJECT_STORES:
        return "this takes a path of a file system, not the URL of an object store; give a path"
    if scheme in _OTHER_NAMES:
        other = _OTHER_NAMES[scheme]
        return f"stager does not support {scheme}://; write {f'{other}://{rest}'!r} if the store speaks that protocol"
    if scheme in _DOWNLOADED:
        advice = "To read what is there, download it, and give the path of the file or directory"
    else:
        advice = "Give a path: where that storage is mounted, or on a local disk, and copy checkpoints yourself"
    return f"stager does not support {scheme}://, only file systems, s3://, gs:// and az://. {advice}"


def _expand_variables(text: str, what: str, environ: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not environ.get(name):
            state = "is empty" if name in environ else "is not set"
            raise ArgumentError(
                f"{what} is {text!r}, and the environment variable {name} {state}; set it, or write the path"
            )
        return environ[name]

    return _VARIABLE.sub(value, text)
