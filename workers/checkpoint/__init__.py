"""The checkpoint store: what is on disk, and everything that reads or writes it.

In this order, each folder knowing only those before it: ``layout``, ``formats``, ``directory``, ``write``, ``read``,
``commit``, ``maintenance``. What reads or writes files raises StorageError for a system call that failed, and
CorruptCheckpointError for bytes that are not as they were written.
"""
