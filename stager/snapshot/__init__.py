"""From a state to bytes in a slab.

Reading order: ``taker.py`` (all of it), ``object_pickler.py`` (what is no tensor), ``guard.py`` (what may be copied
later), ``batches.py`` and ``copying.py`` (how bytes get into the slab), ``device_copies.py`` (from an accelerator),
``tripwires.py`` (how a snapshot that is not whole is found), ``held_sources.py`` (why its memory stays until then),
``pieces.py`` (one piece, or several in less memory),
``slab_writer.py`` (what else is in the slab), ``picker.py``. The plan that they follow is made in ``stager/state``.
"""
