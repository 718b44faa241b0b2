"""The keys of the rendezvous: every name under which ranks post, count or meet.

A key that ends in a save id, a round or a step belongs to one save, one load or one restore, so no key is used twice.
Save ids come from :meth:`stager.ranks.rank_group.RankGroup.save_id`: every rank derives the same one.
"""

opening = "opening/{}".format  # by number of the directory: barrier, every rank holds its lock
opened = "opened/{}".format  # by number of the directory: broadcast of DirectoryOpened
host = "host/{}".format  # count of the ranks on a host

NEWEST = "newest"  # NewestStep: the step of the last checkpoint that a rank knows of
agreement = "agreement/{}".format  # by save id, as retry counts differ between ranks: barrier and head of the agreement
save_end = "saves/{}".format  # by save id: SaveCommitted or SaveFailed, how the save ended
every_part = "saves/{}/every-part".format  # by save id: EveryPartWritten, at a deadline only the commit was missing
failure = (
    "saves/{}/failure".format
)  # by save id: Number of the saves that each rank had begun when it knew of the failure;
# /raises under it: Number of the save() that raises, on all ranks
commit_helpers = "saves/{}/helpers".format  # by save id: count of the ranks but 0 that found every part and no commit

load = "load/{}".format  # by number of the try: barrier and head of a load
load_names = "load/{}/names".format  # by number of the try: barrier and list of LoadNames, names that a rank lacks
load_fits = "load/{}/fits".format  # by number of the try: barrier of the ranks that have checked, and changed nothing
load_names_had = "load/{}/names-had".format  # the same of the names among these that a rank has

restore = "replicas/restore/{}".format  # by number, from 1: barrier and head of a restore from replicas
REPLICAS_NEWEST = "replicas/newest"  # broadcast of NewestStep, after a restore: the newest checkpoint on the disk
REPLICAS_OPENED = "replicas/opened"  # barrier: rank 0 has tidied the directory up after a restore
exchange = (
    "replicas/{0[0]}-{0[1]}/{1}".format
)  # by both ranks and save id: barrier of two partners before they exchange
replica_fate = "replicas/whole/{}".format  # by save id: ReplicaFate; /received under it counts the ranks with a replica
