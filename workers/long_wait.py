"""Whoever waits long says so: what for, and how long at most. Once for each wait, in the log.

waiting = LongWait("a free buffer", at_most_secs=60)
while not done():
    waiting.tick()
    ...
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger("stager")

LONG_SECS = 2.0
ADVICE_SECS = 10.0


class LongWait:
    """One wait.

    After ``LONG_SECS`` it is logged: as a warning, or as information if there is advice. Advice is logged as a warning
    after ``ADVICE_SECS``.

    Args:
        what: what is waited for, after "waiting for".
        at_most_secs: until whoever waits gives up; None: there is no limit.
        reason: why it waits, and what shortens that; told with the first message.
        advice: makes what to do about it; called once, only after ``ADVICE_SECS``. None: there is no advice.
        clock: seconds.
    """

    def __init__(
        self,
        what: str,
        at_most_secs: float | None = None,
        reason: str = "",
        advice: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._limit = "without a time limit" if at_most_secs is None else f"for {at_most_secs:g} s at most"
        self._reason = f": {reason}" if reason else ""
        self._advice = advice
        self._clock = clock
        self._started = clock()
        self._was_told = False

    def tick(self) -> None:
        """Say so if the wait has become long. Call it now and then while waiting."""
        secs = self._clock() - self._started
        if not self._was_told and secs >= LONG_SECS:
            self._was_told = True
            level = logging.WARNING if self._advice is None else logging.INFO
            logger.log(level, "waiting for %s, %s%s", self._what, self._limit, self._reason)
        if self._advice is not None and secs >= ADVICE_SECS:
            make, self._advice = self._advice, None
            logger.warning("waiting for %s since %.0f s, %s: %s", self._what, secs, self._limit, make())

    def until(self, wait: Callable[[float | None], bool], timeout: float | None = None) -> bool:
        """Wait with a function that blocks.

        Args:
            wait: blocks for so many seconds (None: without end); returns whether what it waited for has come.
            timeout: seconds; None: no limit.

        Returns:
            Whether it came in time.
        """
        if timeout is not None and timeout <= LONG_SECS:
            return wait(timeout)
        if wait(LONG_SECS):
            return True
        self.tick()
        return wait(None if timeout is None else timeout - LONG_SECS)
