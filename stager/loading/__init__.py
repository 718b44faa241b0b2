"""Loading checkpoints: from files back to a state.

Reading order: ``loader.py`` (which checkpoint), ``restore.py`` (the steps of a restore), ``match.py`` and
``restore_plan.py`` (what goes where), ``belongings.py`` (what is data, and what belongs to somebody), ``replacing.py`` and
``merge.py`` (how data becomes what was saved). ``joint_loader.py`` loads one checkpoint on all ranks; ``foreign.py`` loads
checkpoints that stager did not write (``foreign_path.py``: whose is it; ``foreign_restore.py``: the steps;
``rank_names.py``: what other ranks load of it). ``lookalikes.py`` names what could be taken for checkpoints where none are.

    reading/   from files into memory, without keys
    pickles/   objects, without running code
    dcp/       through the planners of torch.distributed.checkpoint
"""
