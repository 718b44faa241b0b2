"""Errors of saves that nobody has read: the next ``save()``, or ``close()``, raises them."""

from __future__ import annotations

from itertools import pairwise

from stager.saving.save import Save


class UnreadErrors:
    """The saves whose errors somebody may still have to be told."""

    def __init__(self) -> None:
        self._saves: list[Save] = []

    def add(self, save: Save) -> None:
        """Watch a save."""
        self._saves.append(save)

    def raise_oldest(self) -> None:
        """Raise the oldest error that nobody has read, if there is one. It counts as read then."""
        self._saves = [s for s in self._saves if not s.upload_completion.done() or s.upload_completion.unread_error()]
        for save in self._saves:
            error = save.upload_completion.unread_error()
            if error is not None:
                save.upload_completion.was_read = True
                raise error

    def raise_all(self) -> None:
        """Raise the oldest unread error, with the others as its context: there is no later call that could raise them."""
        distinct: dict[int, BaseException] = {}
        for save in self._saves:
            error = save.upload_completion.unread_error()
            if error is not None:
                distinct[id(error)] = error
                save.upload_completion.was_read = True
        errors = list(distinct.values())
        for error, following in pairwise(errors):
            last = error
            while (inner := last.__cause__ or last.__context__) is not None:
                last = inner
            if last is not following:
                last.__context__ = following
        if errors:
            raise errors[0]
