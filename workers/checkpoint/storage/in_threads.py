"""Apply a function to many arguments in several threads, for functions that mostly wait for a file system."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


def in_threads(action: Callable[[A], T], arguments: Sequence[A], num_threads: int) -> list[T]:
    """Return the results of ``action`` for each of ``arguments``, in order. All threads have ended when it returns.

    Args:
        num_threads: the most threads to use, the caller's included.

    Raises:
        BaseException: what ``action`` raised for the first argument, in their order, for which it raised. So several
            threads raise what one would. ``action`` may or may not have run for later arguments.
    """
    if num_threads < 2:
        return [action(argument) for argument in arguments]
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}
    left = iter(range(len(arguments)))
    taking = threading.Lock()

    def work() -> None:
        while not errors:
            with taking:  # in order: every argument before a failed one was begun before it
                number = next(left, None)
            if number is None:
                return
            try:
                results[number] = action(arguments[number])
            except BaseException as error:  # noqa: BLE001  # raised in the caller's thread below
                errors[number] = error

    started: list[threading.Thread] = []
    try:
        with suppress(RuntimeError):  # the process may not start more threads: those it has do the work
            for _ in range(min(num_threads, len(arguments)) - 1):
                thread = threading.Thread(target=work, name="stager-at-once", daemon=True)
                thread.start()
                started.append(thread)
        work()
    finally:
        for thread in started:
            thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(arguments))]
