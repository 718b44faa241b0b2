"""Where checkpoints are kept: one interface, and what implements it.

    storage.py     Storage: the names in a run's directory, and the transitions between them
    entry.py       Entry: one of these directories, open: its small files, and where a save's data go
    sink.py        Sink: takes the data of a part of a save
    data_file.py   DataFile: one data file of a committed checkpoint, open for reading
    run_lock.py    RunLock: the lock of a run
    unchanged.py   what an incremental save links

    places.py      which storage keeps a path
    posix/         a file system: a save is committed by renaming its directory
    objects/       an object store: a save is committed by creating its manifest

A directory of a run has one name at a time (``documents/names.py``). The name says what it is: ``<name>`` a committed
checkpoint, ``<name>.partial-<save_id>`` a save that is not committed, and so on. The transitions are ``rename`` and
``publish``. Each happens as a whole or not at all, also when a process dies in it, and of several that would take one name
from a directory, one succeeds. A storage without a rename has to do that by other means.

``tests/storage_contract`` is what each implementation has to pass.
"""
