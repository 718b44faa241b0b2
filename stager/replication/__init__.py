"""Each rank's newest snapshots, in a partner's memory too: ``replication.partners: 1``. In reading order:

replication       what a Checkpointer has of all this
replicator        after each save: this rank's snapshot to its partner, another rank's from there; in a thread
exchange          one parcel to one rank, and one from another; which rank is whose partner, and the connection to it
parcel            a state dict as a header and a few slabs (for torch's ``ReplicationStager``)
replicas          the replicas on this host: files in memory, which outlive the trainer
keeper            receives one rank's snapshots into two such files in turn
replica_restorer  when a run begins: what is in the partners' memory, and not on the disk, becomes a checkpoint
candidates        which save that is: newer than the disk, and whole
"""
