"""The settings of `stager stress`: a section of its own, and stager's sections, whose given values are not drawn."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from stager.config import Section, StagerConfig
from stager.config.models import Seconds
from stager.config.sizes import Bytes

Kind = Literal["point", "signal", "errno", "raise", "slow", "full-disk", "pressure", "removed", "damage"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class StressSettings(Section):
    """What is drawn, and the deadlines. ``configs/stress.yaml`` repeats the defaults."""

    faults: list[Kind] = Field(default=list(KINDS), description="Kinds of faults that are drawn.")
    max_faults: int = Field(default=3, ge=0, description="Faults in one episode, at most.")
    max_saves: int = Field(default=40, ge=2, description="Saves in one episode, at most; most have a handful.")
    max_state_bytes: Annotated[Bytes, Field(ge=1 << 20)] = Field(default=8 << 20, description="Size of a state.")
    max_workers: int = Field(default=3, ge=1, description="Worker processes of one trainer, at most.")
    pressure_bytes: Annotated[Bytes, Field(ge=1 << 20)] = Field(
        default=256 << 20, description="Memory that is taken at most, and never more than a tenth of what is available."
    )
    run_deadline_secs: Seconds = Field(
        default=120.0, description="Seconds for one run of a trainer; then it hangs. Longer where others use the cores."
    )
    gone_deadline_secs: Seconds = Field(
        default=30.0, description="Seconds after a trainer's end in which its last process must have ended."
    )
    task_timeout_secs: Seconds = Field(
        default=4.0, description="workers.task_timeout_secs and heartbeat_timeout_secs where a worker is stopped."
    )
    start_timeout_secs: Seconds = Field(
        default=30.0, description="workers.start_timeout_secs where a worker is stopped."
    )
    shmem_tolerance_bytes: Annotated[Bytes, Field(ge=1 << 20)] = Field(
        default=64 << 20, description="By how much Shmem may differ after an episode: others use it, too."
    )


class StressConfig(StagerConfig):
    """stager's configuration with the section of the stress command."""

    stress: StressSettings = Field(default_factory=StressSettings, description="What stager stress draws.")

    def held(self) -> dict[str, dict[str, Any]]:
        """The values of stager's sections that a file, the environment or --set gives; these are not drawn."""
        return {
            name: section
            for name in StagerConfig.model_fields
            if (section := getattr(self, name).model_dump(exclude_unset=True))
        }


def choices(section: str, key: str) -> tuple[Any, ...]:
    """The values that a setting may have; empty if this version lacks the setting."""
    field = StagerConfig.model_fields[section].default.__class__.model_fields.get(key)
    return () if field is None else get_args(field.annotation)
