"""The checkpoint store: what is on disk, and everything that reads or writes it.

In this order, each folder knowing only those before it: ``layout``, ``formats``, ``directory``, ``write``, ``read``,
``commit``, ``maintenance``.
"""
