"""Where checkpoints are kept: one interface, and what implements it.

contract.py   the interface: a storage, its directories, what it guarantees
places.py     which storage keeps a path
posix/        a file system: a save is committed by renaming its directory
"""
