"""Each rank's newest snapshots, in a partner's memory too: ``replication.partners: 1``.

replication  what a Checkpointer has of all this
replicas     what this host keeps: files in memory, which outlive the trainer
keeper       receives one rank's snapshots into two of them in turn
link         the connection to one other rank
replicator   after each save: this rank's snapshot to its partner, another's from there; in a thread
candidates   which save is newer than what is on the disk, and whole
restorer     when a run begins: what is in the partners' memory, and not on the disk, becomes a checkpoint
"""
