"""The ranks that make one checkpoint together. One rank is a group of one. In reading order:

rank_group     ``RankGroup``: barrier, broadcast, gather, the first message for all; which ranks there are
messages       every message that ranks send, and the one place that encodes them
keys           every key under which they post, count and meet
rendezvous     the key-value store that carries the messages
launch         how many ranks share this host, from the launcher's environment
opening        rank 0 takes the run's lock and tidies up, then all ranks hold the lock
agreement      which ranks hold which leaves; agreed once for each structure of the state
partition      which leaves, or rows of leaves, this rank writes
digests        what the ranks compare of values that should be the same on all of them
cutting        how the ranks that hold the same leaves cut them into partitions
naming         which names this rank's structure has: what it writes, and, on one rank, what it leaves to others
save_messages  what a rank posts and reads of a save
commit_watch   how a save ends: the same way on every rank, in bounded time
"""
