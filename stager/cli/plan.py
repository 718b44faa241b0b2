"""``stager plan``: what a state needs of its hosts, before the job is started. The work is in :mod:`stager.planning`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from stager.cli.console import print_json, printable, stdout
from stager.cli.options import ConfigOption, JsonOption, SetOption, load_settings
from stager.cli.selection import select_checkpoints
from stager.cli.state_options import OptimizerName, host_of_options, job_of_options, state_of_options

if TYPE_CHECKING:
    from stager.planning import Need, StateSource


_PROBLEMS = {  # by verdict
    "fewer in flight": "there is memory for fewer snapshots at a time than arena.buffers",
    "in pieces": "a snapshot is larger than the memory for it, so each save is made in pieces",
    "too large": "a snapshot is too large for the memory for it, even in pieces",
    "not enough memory": "the host has less memory than buffers and workers would take",
}


def plan(
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="A checkpoint, or the run's directory: plan for its state.")
    ] = None,
    *,
    module: Annotated[
        str | None,
        typer.Option(
            metavar="PKG.MOD:CALLABLE",
            help="Callable that returns a state, an nn.Module, or (module, optimizer). Runs that code.",
        ),
    ] = None,
    meta: Annotated[bool, typer.Option("--meta", help="Call it on the meta device: no memory for tensors.")] = False,
    params: Annotated[
        str | None, typer.Option(metavar="N", help="Plan for so many parameters: 124000000, 124M, 70B.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of --params: float32, bf16, ...")] = "float32",
    tensors: Annotated[int, typer.Option(min=1, help="Into how many tensors --params are divided.")] = 300,
    optimizer: Annotated[
        OptimizerName | None, typer.Option(help="Optimizer whose state to assume, with --params or a module alone.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Trainers of the job. Default: those of one host.")] = None,
    local_world_size: Annotated[
        int | None, typer.Option(min=1, help="Trainers on one host. Default: LOCAL_WORLD_SIZE, else 1.")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="Ranks that each tensor is sharded over, as by FSDP.")] = 1,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory available on a host, e.g. 512GiB; this host's otherwise.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores of a host; those usable here otherwise.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Which checkpoint of the run; the newest otherwise.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what saving a state takes: buffers, host memory, workers, disk. Exit 1 if it does not fit as configured."""
    from stager.config import StagerConfig
    from stager.planning import work_out
    from stager.workers.errors import UsageError

    if sum(given is not None for given in (path, module, params)) != 1:
        raise UsageError("give one of these, and one only: a checkpoint or the directory of a run, --module, --params")
    if meta and module is None:
        raise UsageError("--meta goes with --module only; give one, or leave it out")
    if path is not None and optimizer is not None:
        raise UsageError(
            "--optimizer goes with --module or --params only; leave it out: a checkpoint already has the state of its "
            "optimizer, if it has one"
        )
    if step is not None and path is None:
        raise UsageError("--step goes with the directory of a run only; give one, or leave it out")
    settings = load_settings(config, overrides, StagerConfig)
    job = job_of_options(ranks, local_world_size, shards)
    host = host_of_options(memory, cores)
    source = _source(path, step, module, meta, params, dtype, tensors, optimizer)
    need = work_out(source.state, settings, job, host)
    if as_json:
        print_json({"source": source.name, "assumed": source.assumed, "fits": need.fits, **asdict(need)})
    else:
        _print(source, need, this_host=memory is None)
    if not need.fits:
        raise typer.Exit(1)


def _source(
    path: str | None,
    step: int | None,
    module: str | None,
    meta: bool,
    params: str | None,
    dtype: str,
    tensors: int,
    optimizer: OptimizerName | None,
) -> StateSource:
    from stager.planning import from_checkpoint

    if path is None:
        return state_of_options("--module", module, meta, params, dtype, tensors, optimizer)
    (checkpoint,) = select_checkpoints(path, step)
    return from_checkpoint(checkpoint)


def _print(source: StateSource, need: Need, this_host: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value, note in _rows(source, need, this_host):
        table.add_row(name, Text(printable(value)), Text(printable(note), style="dim"))
    console.print(table)
    for assumed in source.assumed:
        console.print(f"assumed: {printable(assumed)}", markup=False, soft_wrap=True)
    verdict = "it fits" if need.fits else f"it does not fit as configured: {_PROBLEMS[need.verdict.value]}"
    console.print(verdict, style="green" if need.fits else "bold red")
    for advice in need.advice:
        console.print(f"-> {printable(advice)}", markup=False, soft_wrap=True)


def _rows(source: StateSource, need: Need, this_host: bool) -> list[tuple[str, str, str]]:
    from stager.config.sizes import format_bytes

    job, rank = need.job, need.rank
    available = f"{format_bytes(need.host.available_bytes)} are available {'here' if this_host else 'there'}"
    ranks = f"{job.num_ranks} rank{'s' * (job.num_ranks > 1)}, {job.local_world_size} on a host"
    replicas = [("replicas", format_bytes(need.replica_nbytes), "for each rank: two snapshots of its partner's")]
    replicas = replicas if need.replica_nbytes else []
    rows = [
        ("state", source.name, ""),
        ("tensors", f"{need.state.num_tensors}", f"and {need.state.num_objects} pickled objects"),
        (
            "disk per checkpoint",
            format_bytes(need.state.disk_nbytes),
            "of the whole job; what several ranks have alike counts once",
        ),
        ("job", ranks, f"each tensor sharded over {job.num_shards}" if job.num_shards > 1 else "nothing is sharded"),
        ("buffer", format_bytes(rank.slab_nbytes), f"one snapshot of one rank, {rank.slab_nbytes} bytes"),
        ("buffers", f"{need.num_buffers} (arena.buffers)", f"{format_bytes(need.wanted_arena_nbytes)} for each rank"),
        ("workers", f"{need.num_workers} for each rank", f"at most {format_bytes(need.worker_nbytes)} together"),
        *replicas,
        (
            "memory of a rank",
            format_bytes(need.staging.arena_nbytes + need.worker_nbytes + need.replica_nbytes),
            "all of these" if replicas else "buffers and workers",
        ),
        (
            "memory of a host",
            format_bytes(need.host_nbytes),
            available,
        ),
        ("budget of a rank", format_bytes(need.budget_nbytes), "for buffers: arena.max_host_bytes"),
        ("open files", f"about {need.num_descriptors} for each rank", "more tensors take no more of them"),
    ]
    return rows
