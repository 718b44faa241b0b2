"""``stager``: the commands and their exit codes.

0: ok. 1: the answer is no, for example because a checkpoint is damaged or missing, or a check failed. 2: wrong usage or
    settings.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stager.cli.console import print_error
from stager.cli.copy_command import copy
from stager.cli.demo import demo
from stager.cli.doctor import doctor
from stager.cli.export import export
from stager.cli.init import init
from stager.cli.inspect import inspect
from stager.cli.ls import ls
from stager.cli.plan import plan
from stager.cli.prune_command import prune
from stager.cli.recover_command import recover
from stager.cli.stress import stress
from stager.cli.verify_command import verify
from stager.workers._version import __version__

EXIT_NO = 1
EXIT_USAGE = 2


class _ErrorsAsExitCodes(TyperGroup):
    """Turns stager's errors into a message on stderr and an exit code. Any other error is a bug: it keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # pydantic's words, by which typer converts
            raise
        except Exception as error:
            from stager.workers.errors import (  # late: a command that succeeds may not need torch
                StagerError,
                UsageError,
            )

            if not isinstance(error, StagerError):
                raise
            print_error(str(error))
            raise typer.Exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_NO) from error


app = typer.Typer(
    name="stager",
    cls=_ErrorsAsExitCodes,
    help="Checkpoint staging for PyTorch: look at checkpoints, verify them, check this host, run the demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (init, demo, ls, inspect, verify, copy, export, recover, prune, doctor, plan, stress):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"stager {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script. Does not return: it exits with 0, 1 or 2."""
    app(prog_name="stager")
