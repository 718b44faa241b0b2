"""The code blocks of a document, and how each kind is run.

Python: in the order of the document, in one namespace that has what a training loop has (:mod:`tests.house.block_names`).
Shell: each ``stager`` command, in this process. YAML: loaded as a configuration. Bash: parsed. What else there is of shell
commands is listed in ``NOT_RUN``, each with its reason.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.house.block_names import Namespace

ROOT = Path(__file__).parents[2]

NOT_RUN = {
    "make ": "takes minutes, and calls what other tests run; test_docs.py looks for its target",
    "python3 -m venv ": "makes an environment; tests/house/test_newcomer.py makes one from the wheel",
    "pip install ": "installs from a package index; tests/house/test_newcomer.py installs the wheel",
    ".venv/bin/": "needs the environment of the line above it",
    "torchrun ": "starts a job of several processes; tests/demo and tests/ranks do",
    "python -m tests.": "a measurement of minutes to hours; its module is looked for",
}
"""How a command begins that is not run, and why."""

MAY_SAY_NO = {"plan": "whether it fits depends on the host", "doctor": "what it finds depends on the host"}
"""Commands of stager that may exit with 1."""

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        document: path of the document, from the root of the repository.
        line: of the block's first line, from 1.
        language: the word after the fence; empty for text.
    """

    document: str
    line: int
    language: str
    text: str


def documents() -> list[str]:
    """The README and every page of the site, by their paths from the root of the repository."""
    pages = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", *(page for page in pages if not page.startswith("docs/results/"))]


RUN_ELSEWHERE = {
    "docs/mistakes.md": "every block of it is a mistake; tests/mistakes makes each of them",
    "docs/object-stores.md": "tests/object_stores/test_page.py runs it with a server",
    "docs/integrations/accelerate.md": "its script is killed and resumed by tests/integrations",
    "docs/integrations/deepspeed.md": "its script is killed and resumed by tests/integrations",
    "docs/integrations/megatron-bridge.md": "tests/integrations save and load in ranks of their own, as its blocks do",
    "docs/integrations/ray.md": "its script is run by Ray, whose workers tests/integrations kill",
    "docs/integrations/torchft.md": "its script is run by tests/integrations, also as two groups, one of which is killed",
    "docs/integrations/torchdata.md": "its script is killed and resumed by tests/integrations",
    "docs/integrations/torchtitan.md": "its script is killed and resumed by tests/integrations",
    "docs/integrations/lightning.md": "its script is killed and resumed by tests/integrations",
    "docs/integrations/torch_checkpointing.md": "its script is killed and resumed by tests/integrations",
    "docs/integrations/transformers.md": "its script is killed and resumed by tests/integrations, which run the rest, too",
}
"""Documents whose blocks other tests run, and why."""


def blocks_of(document: str) -> list[Block]:
    """The blocks of a document, in order."""
    text = (ROOT / document).read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(document, line, match[2], textwrap.dedent(match[3])))
    return found


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    stripped = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    return [line for line in stripped if line]


def reason_not_to_run(command: str) -> str | None:
    """Why a command is not run; None if it is."""
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


def run_document(document: str, prepared: str) -> None:
    """Run every block of ``document`` in the current directory, in order. Called in a process of its own.

    Args:
        prepared: a run with some checkpoints. A run that a command names and that does not exist is a copy of it.
    """
    from tests.house.block_names import Namespace, prepare_process

    prepare_process()
    names = Namespace()
    for block in blocks_of(document):
        print(f"{document}:{block.line}", file=sys.stderr)  # the last one before a traceback is the one that failed
        run_block(block, names, prepared)


def needs_process(block: Block) -> bool:
    """Whether it runs code that must not run in the test's own process."""
    if block.language == "sh":
        return any(reason_not_to_run(command) is None for command in commands_of(block))
    return block.language == "python"


def run_block(block: Block, names: Namespace | None = None, prepared: str = "") -> None:
    """Run one block, in the current directory.

    Args:
        names: for Python.
        prepared: as of :func:`run_document`.
    """
    if block.language == "python":
        assert names is not None
        # Empty lines before it: a traceback then has the lines of the document.
        names.run(compile("\n" * (block.line - 1) + block.text, ROOT / block.document, "exec"), block.text)
    elif block.language == "sh":
        for command in commands_of(block):
            _run_command(command, prepared)
    elif block.language == "yaml":
        _load(block.text)
    elif block.language == "bash":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    else:
        assert block.language in ("", "text"), f"nothing runs blocks of {block.language}"


def _load(text: str) -> None:
    import yaml

    from stager import load_config

    load_config(yaml.safe_load(text), environ={})


def _run_command(command: str, prepared: str) -> None:
    from typer.testing import CliRunner

    from stager.cli import app

    if reason_not_to_run(command) is not None:
        return
    program, *arguments = shlex.split(command)
    assert program == "stager", f"{command}: nothing runs this command; see NOT_RUN"
    for run in re.findall(r"\bruns/\w+", command):
        if not os.path.exists(run):
            shutil.copytree(prepared, run)
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    allowed = (0, 1) if arguments[0] in MAY_SAY_NO else (0,)
    assert result.exit_code in allowed, f"{command}: exit code {result.exit_code}\n{result.output}"


def all_commands() -> Iterator[tuple[Block, str]]:
    """Every command of every shell block of every document."""
    for document in documents():
        for block in blocks_of(document):
            for command in commands_of(block) if block.language == "sh" else ():
                yield block, command
