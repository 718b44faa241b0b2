"""Measures the house: ``python -m tests.house.metrics [ROOT ...] [--json]``; several roots are printed side by side.

core         ``stager/`` and ``workers/`` without the tools
tools        cli, demo, stress, doctor, planning
code         lines without blanks, comments and docstrings
modes        ``x is None`` where ``x`` is annotated as one of our own collaborators or None: a class with methods that is
             neither a dataclass nor an Enum nor an exception
comments     of the files that coordinate processes, ranks and commits: share of lines that are not blank
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = {"cli", "demo", "stress", "doctor", "planning"}
COORDINATING = {
    *("pool", "supervisor", "roster", "process", "worker_main", "main", "worker_loop", "service"),
    *(
        "saver",
        "completion",
        "settler",
        "commit_watch",
        "outcome",
        "agreement",
        "rendezvous",
        "board",
        "rank_group",
        "job",
    ),
    *("replicator", "restorer", "commit", "persist", "recover", "retention", "staging_thread", "hand_over"),
}
"""File names, today's and those of version 0.1."""


@dataclass
class Source:
    """One file, parsed once."""

    path: Path
    module: str
    text: str
    tree: ast.Module
    comments: set[int] = field(default_factory=set)
    docstrings: set[int] = field(default_factory=set)

    @property
    def is_core(self) -> bool:
        return not TOOLS & set(self.module.split(".")[1:2])

    @property
    def folder(self) -> str:
        """Of a package's ``__init__`` the package; of other files their folder. ``__main__`` stands for itself."""
        return self.module if self.path.stem in ("__init__", "__main__") else self.module.rpartition(".")[0]

    @property
    def nonblank(self) -> set[int]:
        return {number for number, line in enumerate(self.text.splitlines(), 1) if line.strip()}

    @property
    def code(self) -> set[int]:
        return self.nonblank - self.comments - self.docstrings


def read_sources(root: Path) -> dict[str, Source]:
    """Every module of ``stager`` and ``workers``, by the name that it has inside the project."""
    sources = {}
    for top, prefix in (("stager", ""), ("workers", "stager.")):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[:2] == ("stager", "workers"):
                continue  # the link
            module = prefix + ".".join(parts).removesuffix(".__init__")
            text = path.read_text()
            source = Source(path, module, text, ast.parse(text))
            _find_comments(source)
            sources[module] = source
    return sources


def _find_comments(source: Source) -> None:
    lines = source.text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            source.comments.add(token.start[0])
    for node in ast.walk(source.tree):
        for statement in getattr(node, "body", []) if isinstance(getattr(node, "body", []), list) else []:
            is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if is_text and isinstance(statement.value.value, str):
                source.docstrings |= set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))


def imports(source: Source, known: dict[str, Source]) -> Iterator[str]:
    """Our own modules that a file imports, late imports and those for type checking included."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for imported in names:
            name = (
                imported if imported.startswith("stager") else f"stager.{imported}"
            )  # version 0.1 imported ``workers``
            module = name if name in known else name.rpartition(".")[0]
            if module in known and module != source.module:
                yield module


def _is_within(one: str, other: str) -> bool:
    """A package and what is in it are no pair: its ``__init__`` is the door to the rest."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _pairs(edges: set[tuple[str, str]]) -> list[str]:
    return sorted(f"{a} <-> {b}" for a, b in edges if a < b and (b, a) in edges and not _is_within(a, b))


def collaborators(sources: dict[str, Source]) -> set[str]:
    """Names of our classes that do something, as opposed to records."""
    found = set()
    for source in sources.values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                decorators = {ast.unparse(d).split("(")[0] for d in node.decorator_list}
                bases = " ".join(map(ast.unparse, node.bases))
                is_record = "dataclass" in decorators or any(
                    b in bases for b in ("Enum", "Error", "Exception", "Tuple")
                )
                if not is_record and any(isinstance(s, ast.FunctionDef) for s in node.body):
                    found.add(node.name)
    return found


def modes(source: Source, classes: set[str]) -> int:
    """How many ``is None`` ask whether a collaborator is there."""
    optional = set()
    for node in ast.walk(source.tree):
        annotation = getattr(node, "annotation", None)
        if annotation is not None and "None" in (text := ast.unparse(annotation)).replace(" ", "").split("|"):
            name = node.arg if isinstance(node, ast.arg) else _last_name(getattr(node, "target", None))
            if set(text.replace(" ", "").split("|")) & classes:
                optional.add(name.lstrip("_"))
    count = 0
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            is_none = isinstance(node.comparators[0], ast.Constant) and node.comparators[0].value is None
            count += is_none and _last_name(node.left).lstrip("_") in optional
    return count


def _last_name(node: ast.AST | None) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def measure(root: Path) -> dict[str, object]:
    """All figures of a checkout."""
    sources = read_sources(root)
    edges = {(source.module, target) for source in sources.values() for target in imports(source, sources)}
    folders = {(sources[a].folder, sources[b].folder) for a, b in edges if sources[a].folder != sources[b].folder}
    importers = Counter(target for _, target in edges)
    classes = collaborators(sources)
    functions = [
        ((node.end_lineno or 0) - node.lineno + 1, f"{source.module}:{node.name}")
        for source in sources.values()
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    files = [(len(source.text.splitlines()), source.module) for source in sources.values() if source.text]
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for source in sources.values():
        part = sums["core" if source.is_core else "tools"]
        part += Counter(files=1, lines=len(source.text.splitlines()), code=len(source.code))
        part["modes"] += modes(source, classes)
    shares = {
        source.module: (
            round(len(source.comments) / len(source.nonblank), 3),
            round(len(source.comments | source.docstrings) / len(source.nonblank), 3),
        )
        for source in sources.values()
        if source.path.stem in COORDINATING and source.is_core
    }
    return {
        **{f"{part} {name}": value for part, figures in sums.items() for name, value in figures.items()},
        "files with one importer": sum(count == 1 for count in importers.values()),
        "function, median lines": statistics.median(length for length, _ in functions),
        "function, longest": max(functions),
        "file, median lines": statistics.median(length for length, _ in files),
        "file, longest": max(files),
        "folders that import each other": _pairs(folders),
        "files that import each other": _pairs(edges),
        "coordinating files, median share of comments": statistics.median(share for share, _ in shares.values()),
        "the same, docstrings included": statistics.median(share for _, share in shares.values()),
        "coordinating files": shares,
    }


def main() -> None:
    """Print the figures of one checkout, or of several side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="*", type=Path, default=[Path(__file__).parents[2]])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    measured = [measure(root) for root in arguments.roots]
    if arguments.json:
        print(json.dumps(measured, indent=2))
        return
    for name in measured[0]:
        values = [figures.get(name) for figures in measured]
        if name == "coordinating files":
            continue
        print(f"{name:48}", "   ".join(str(value) for value in values))


if __name__ == "__main__":
    main()
