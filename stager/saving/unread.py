"""Errors in the background that nobody has looked at: the next call, or the last one, raises them."""

from __future__ import annotations

from itertools import pairwise

from stager.saving.save import SaveHandle


class Unread:
    """The saves whose errors somebody may still have to be told."""

    def __init__(self) -> None:
        self._handles: list[SaveHandle] = []

    def add(self, handle: SaveHandle) -> None:
        self._handles.append(handle)

    def raise_oldest(self) -> None:
        """Raise the oldest error that nobody has seen, if there is one."""
        self._handles = [h for h in self._handles if not h.upload_completion.done() or _error_of(h)]
        for handle in self._handles:
            error = _error_of(handle)
            if error is not None:
                handle.upload_completion.was_read = True
                raise error

    def raise_all(self) -> None:
        """At the end there is no later call that could raise the others: they follow the oldest as its context."""
        handles = [handle for handle in self._handles if _error_of(handle) is not None]
        errors = [error for handle in handles if (error := _error_of(handle)) is not None]
        for handle in handles:
            handle.upload_completion.was_read = True
        distinct = list({id(error): error for error in errors}.values())
        for error, following in pairwise(distinct):
            last: BaseException = error
            while (inner := last.__cause__ or last.__context__) is not None:
                last = inner
            if last is not following:
                last.__context__ = following
        if distinct:
            raise distinct[0]


def _error_of(handle: SaveHandle) -> BaseException | None:
    return handle.upload_completion.unread_error()
