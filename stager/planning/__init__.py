"""What a state needs before a job is started: host memory, descriptors, disk (``stager plan``).

source.py     where the state comes from: a checkpoint, a callable, plain numbers
optimizers.py the state an optimizer will have after its first step
stand_in.py   tensors that take no memory, in place of those that are not there
footprint.py  the state through stager's own planner: bytes of a slab, of a checkpoint
work_out.py   that, times ranks and buffers, against a host (need.py: the result)
advice.py     which settings to change
"""

from stager.planning.footprint import Footprint, Measured
from stager.planning.need import Host, Job, Need, Staging, Verdict
from stager.planning.source import Source, from_callable, from_checkpoint, from_numbers
from stager.planning.work_out import work_out

__all__ = [
    "Footprint",
    "Host",
    "Job",
    "Measured",
    "Need",
    "Source",
    "Staging",
    "Verdict",
    "from_callable",
    "from_checkpoint",
    "from_numbers",
    "work_out",
]
