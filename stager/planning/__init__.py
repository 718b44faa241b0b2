"""What a state needs before a job is started: host memory, descriptors, disk (``stager plan``).

source.py     where the state comes from: a checkpoint, a callable, plain numbers
optimizers.py the state of an optimizer after its first step
stand_in.py   tensors without memory, in place of those on the meta device or of other ranks
footprint.py  the state in stager's own planner: bytes of a slab and of a checkpoint
work_out.py   multiplies by ranks and buffers, and compares with a host (need.py: the result)
advice.py     which settings to change

The settings file for a host (``stager init``):

place.py         what is known of the directory of a run
proposal.py      which value each setting should have, and why
settings_file.py the YAML, with comments
"""

from stager.planning.footprint import Footprint, Measured
from stager.planning.need import Host, JobShape, Need, Staging, Verdict
from stager.planning.place import Place, look_at
from stager.planning.proposal import Choice, propose
from stager.planning.settings_file import settings_file
from stager.planning.source import StateSource, from_callable, from_checkpoint, from_numbers
from stager.planning.work_out import work_out

__all__ = [
    "Choice",
    "Footprint",
    "Host",
    "JobShape",
    "Measured",
    "Need",
    "Place",
    "Staging",
    "StateSource",
    "Verdict",
    "from_callable",
    "from_checkpoint",
    "from_numbers",
    "look_at",
    "propose",
    "settings_file",
    "work_out",
]
