"""From a state to bytes in a slab.

Reading order: ``taker.py`` (all of it, in order), ``guard.py`` (what may be copied later), ``batches.py`` and ``copying.py``
(how bytes get into the slab), ``device.py`` (from a GPU), ``pieces.py`` (one piece, or several in less memory),
``slab_writer.py`` (what else is in the slab), ``picker.py``. The plan that they follow is made in ``stager/state``.
"""
