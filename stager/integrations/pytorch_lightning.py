"""stager in Lightning: classes for the package ``pytorch_lightning``.

``stager.integrations.lightning`` has the same ones for the package ``lightning``. The two packages are copies of each
other with classes of their own, and a ``Trainer`` takes only those of its package. docs/integrations/lightning.md has a
whole script.
"""

from __future__ import annotations

try:
    from pytorch_lightning import Callback
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.plugins.io import CheckpointIO
    from pytorch_lightning.strategies import ModelParallelStrategy
except ImportError as error:
    raise ImportError(
        "stager.integrations.pytorch_lightning needs the package pytorch-lightning: pip install pytorch-lightning. If you "
        "import lightning, take stager.integrations.lightning"
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
