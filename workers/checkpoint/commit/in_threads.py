"""The same for many things, in several threads: for what mostly waits, for a file system far away for example."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


def in_threads(action: Callable[[A], T], arguments: Sequence[A], num_threads: int) -> list[T]:
    """What ``action`` returns for each, in order.

    Args:
        num_threads: at most, this one among them; with 1 none is started.

    Raises:
        BaseException: that of the first of ``arguments``, in their order, for which ``action`` raised, as in one thread. It
            comes when no thread is left; what comes after it may have been done or not.
    """
    if num_threads < 2:
        return [action(argument) for argument in arguments]
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}
    left = iter(range(len(arguments)))
    taking = threading.Lock()

    def work() -> None:
        while not errors:
            with taking:  # in order: whatever comes before an error was begun before it
                number = next(left, None)
            if number is None:
                return
            try:
                results[number] = action(arguments[number])
            except BaseException as error:  # noqa: BLE001  # it is the caller's
                errors[number] = error

    started: list[threading.Thread] = []
    try:
        for _ in range(min(num_threads, len(arguments)) - 1):
            thread = threading.Thread(target=work, name="stager-at-once", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the process may have no more: those that there are do all of it
                break
            started.append(thread)
        work()
    finally:
        for thread in started:
            thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(arguments))]
