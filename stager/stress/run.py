"""``stager stress`` from its first episode to its exit code."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stager.stress.conductor import Conductor
from stager.stress.config import StressConfig
from stager.stress.disk import enter_own_namespace
from stager.stress.drawing import draw_episode
from stager.stress.episode import Episode
from stager.stress.forks import ForkServer, ForkServerError
from stager.stress.record import EpisodeResult
from stager.stress.report import Summary, print_report, write_json
from stager.workers.errors import UsageError

_QUIET_SECS = 60.0  # between lines of progress, if there is no terminal for a bar


@dataclass(frozen=True)
class StressOptions:
    """The options of the command line.

    Attributes:
        seed: of all episodes.
        minutes: how long new episodes are begun.
        episodes: numbers of the episodes to play, and no others; empty: from 0 on, until the time is over.
        out: where evidence and results go.
    """

    seed: int
    minutes: float
    out: Path
    episodes: Sequence[int] = ()


@dataclass
class Stage:
    """The fork server and the directories that episodes are played with. A context manager."""

    out: Path

    def __enter__(self) -> Stage:
        self._scratch = tempfile.mkdtemp(prefix="stager-stress-")
        self.faults_dir = os.path.join(self._scratch, "faults")
        os.mkdir(self.faults_dir)
        self.server = ForkServer(self.faults_dir, str(self.out / "server.log"))
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def play(self, episode: Episode, config: StressConfig) -> EpisodeResult:
        """Play one episode. Its files are removed unless there are violations."""
        directory = self.out / f"episode-{episode.number:05d}"
        shutil.rmtree(directory, ignore_errors=True)
        conductor = Conductor(self.server, config.stress, self.faults_dir, str(directory), episode)
        try:
            result = conductor.play()
        except ForkServerError:
            raise
        except Exception as error:  # noqa: BLE001  (an episode that cannot be judged must not lose the report of the others)
            (directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            violation = f"the episode could not be judged: {type(error).__name__}: {error}"
            result = EpisodeResult(episode, violations=[violation], directory=str(directory))
        if not result.violations:
            shutil.rmtree(directory)
            result.directory = ""
        return result


def run_stress(config: StressConfig, options: StressOptions, console: Console, as_json: bool = False) -> int:
    """Play episodes until the time is over, and print what came of them.

    Args:
        console: where progress and tables go; with ``as_json``, the results only, as JSON.

    Returns:
        0: all was as it must be; 1: it was not, and the evidence is kept; or it was interrupted.

    Raises:
        UsageError: ``options.out`` holds something else.
        ForkServerError
    """
    _prepare(options.out)
    summary = Summary(options.seed, str(options.out))
    if "full-disk" in config.stress.faults and (reason := enter_own_namespace()) is not None:
        summary.left_out = {"full-disk": reason}
    bars = Console(stderr=True) if as_json else console
    with Stage(options.out) as stage, _progress(bars) as progress:
        try:
            _play_all(config, options, stage, summary, progress)
        except KeyboardInterrupt:
            summary.interrupted = True
    print_report(summary, console, as_json)
    return 0 if summary.ok else 1


def _play_all(config: StressConfig, options: StressOptions, stage: Stage, summary: Summary, progress: Progress) -> None:
    started = said = time.monotonic()
    total = len(options.episodes) or options.minutes * 60
    bar = progress.add_task("stress", total=total, status="")
    for number in _numbers(options, started):
        episode = draw_episode(options.seed, number, config, frozenset(summary.left_out))
        summary.add(stage.play(episode, config))
        summary.secs = time.monotonic() - started
        # After each episode, so that the file exists even if this process is killed.
        write_json(summary, config, options.out / "stress.json")
        done = len(summary.results) if options.episodes else summary.secs
        progress.update(bar, completed=min(done, total), status=summary.line())
        if progress.disable and time.monotonic() > said + _QUIET_SECS:
            said = time.monotonic()
            progress.console.print(f"{summary.secs:.0f} s: {summary.line()}", soft_wrap=True)


def _numbers(options: StressOptions, started: float) -> Iterator[int]:
    if options.episodes:
        yield from options.episodes
        return
    number = 0
    while number == 0 or time.monotonic() - started < options.minutes * 60:
        yield number
        number += 1


def _prepare(out: Path) -> None:
    """Make the directory empty. Only an empty one, or that of an earlier run of this command, is accepted."""
    out.mkdir(parents=True, exist_ok=True)
    known = [path for path in out.iterdir() if path.name.startswith("episode-")]
    mark = out / "server.log"
    if any(out.iterdir()) and not mark.exists():
        raise UsageError(f"{out} is not empty and not from an earlier `stager stress`; choose another directory")
    for path in known:
        shutil.rmtree(path)
    mark.write_bytes(b"")
    (out / "stress.json").unlink(missing_ok=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    )
