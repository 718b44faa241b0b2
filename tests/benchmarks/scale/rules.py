"""What the code could do otherwise without another protocol: as it is, and as is proposed."""

from __future__ import annotations

from dataclasses import dataclass

from stager.ranks import board, outcome

_COMMIT_THREADS = 32


@dataclass(frozen=True, slots=True)
class Rules:
    """Attributes:
    wait_poll_secs: between two looks for a note that is waited for, in the end (``Board.wait``).
    end_poll_secs: between two looks for the end of a save, in the end (``Outcomes``).
    look_secs: between two looks of a rank at the directory, while it waits for the end of a save.
    everybody_looks: not rank 0 only; and at the deadline every rank lists it, to see whether all parts are written.
    commit_threads: that read records and receipts, and remove them.
    """

    wait_poll_secs: float
    end_poll_secs: float
    look_secs: float
    everybody_looks: bool
    commit_threads: int


def as_it_is(num_ranks: int) -> Rules:
    return Rules(
        wait_poll_secs=board._LAST_POLL_SECS,
        end_poll_secs=max(outcome._LAST_POLL_SECS, num_ranks * outcome._POLL_SECS_PER_RANK),
        look_secs=outcome._LOOK_SECS,
        everybody_looks=True,
        commit_threads=1,
    )


def proposed(num_ranks: int) -> Rules:
    """See "What to change" in docs/scale.md."""
    return Rules(
        wait_poll_secs=max(board._LAST_POLL_SECS, num_ranks * outcome._POLL_SECS_PER_RANK),
        end_poll_secs=max(outcome._LAST_POLL_SECS, num_ranks * outcome._POLL_SECS_PER_RANK),
        look_secs=outcome._LOOK_SECS,
        everybody_looks=False,
        commit_threads=_COMMIT_THREADS,
    )
