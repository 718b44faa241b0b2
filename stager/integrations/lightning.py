"""stager in Lightning: classes for the package ``lightning``.

``stager.integrations.pytorch_lightning`` has the same ones for the package ``pytorch_lightning``. The two packages are
copies of each other with classes of their own, and a ``Trainer`` takes only those of its package.
docs/integrations/lightning.md has a whole script.
"""

from __future__ import annotations

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io import CheckpointIO
    from lightning.pytorch.strategies import ModelParallelStrategy
except ImportError as error:
    raise ImportError(
        "stager.integrations.lightning needs the package lightning: pip install 'stager[lightning]'. If you import "
        "pytorch_lightning, take stager.integrations.pytorch_lightning"
    ) from error

from stager.integrations.lightning_parts.checkpoint_io import CheckpointIOMixin
from stager.integrations.lightning_parts.guarding import GuardMixin
from stager.integrations.lightning_parts.model_checkpoint import ModelCheckpointMixin
from stager.integrations.lightning_parts.model_parallel import ModelParallelMixin
from stager.integrations.lightning_parts.random_state import RandomStateMixin
from stager.integrations.lightning_parts.whole_file import load_from_checkpoint

__all__ = [
    "StagerCheckpointIO",
    "StagerGuard",
    "StagerModelCheckpoint",
    "StagerModelParallelStrategy",
    "StagerRandomState",
    "load_from_checkpoint",
]


class StagerCheckpointIO(CheckpointIOMixin, CheckpointIO):
    __doc__ = CheckpointIOMixin.__doc__


class StagerModelParallelStrategy(ModelParallelMixin, ModelParallelStrategy):
    __doc__ = ModelParallelMixin.__doc__


class StagerGuard(GuardMixin, Callback):
    __doc__ = GuardMixin.__doc__


class StagerRandomState(RandomStateMixin, Callback):
    __doc__ = RandomStateMixin.__doc__


class StagerModelCheckpoint(ModelCheckpointMixin, ModelCheckpoint):
    __doc__ = ModelCheckpointMixin.__doc__
