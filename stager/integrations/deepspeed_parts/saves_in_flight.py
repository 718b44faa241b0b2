"""The saves of one rank that its publisher works on, and the errors of those that failed."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, wait


class SavesInFlight:
    """Saves that were begun, by number, until somebody has looked at what has become of them."""

    def __init__(self) -> None:
        self._futures: dict[int, Future[None]] = {}
        self._told: set[int] = set()  # they failed on another rank, and all ranks have raised that

    def add(self, number: int, future: Future[None]) -> None:
        """Note a save that is published from now on."""
        self._futures[number] = future

    def __bool__(self) -> bool:
        return bool(self._futures)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every save has ended, whatever has become of it.

        Raises:
            TimeoutError: not within ``timeout`` seconds.
        """
        if wait(self._futures.values(), timeout).not_done:
            raise TimeoutError(f"a save was not published within {timeout:g} s; look at the logs of all ranks")

    def take_failures(self) -> dict[int, BaseException]:
        """Return the errors of the saves that have failed meanwhile. They are not returned again."""
        ended = [number for number, future in self._futures.items() if future.done()]
        found = {number: self._futures.pop(number).exception() for number in ended}
        errors = {number: error for number, error in found.items() if error is not None and number not in self._told}
        self._told.difference_update(ended)
        return errors

    def tell(self, numbers: Iterable[int]) -> None:
        """Take note that all ranks have raised the errors of these saves."""
        self._told.update(number for number in numbers if number in self._futures)
