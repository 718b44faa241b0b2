"""Configuration: YAML, environment and ``--set``, checked against one pydantic model per component.

Reading order: ``models.py`` (every key, its unit and default), ``sizes.py`` (``64MiB``, ``75%``), ``precedence.py`` (where
values come from and which wins), ``layers.py`` (one such source), ``problems.py`` (how an error is worded),
``host.py`` (what the ``auto`` values are computed from).
"""

from stager.config.models import (
    ArenaConfig,
    LoadingConfig,
    PersistenceConfig,
    RanksConfig,
    ReplicationConfig,
    RetentionConfig,
    Section,
    StagerConfig,
    StagingConfig,
    TelemetryConfig,
    WorkersConfig,
)
from stager.config.precedence import load_config

__all__ = [
    "ArenaConfig",
    "LoadingConfig",
    "PersistenceConfig",
    "RanksConfig",
    "ReplicationConfig",
    "RetentionConfig",
    "Section",
    "StagerConfig",
    "StagingConfig",
    "TelemetryConfig",
    "WorkersConfig",
    "load_config",
]
