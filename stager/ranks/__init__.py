"""Several ranks that make one checkpoint.

job        who takes part: rank, number of ranks, their notice rendezvous
rendezvous      short notes in the job's key-value store; nobody waits for another but where it says so
opening    rank 0 takes the run's lock and tidies up, then the others join
per_rank   ``PerRank``: a value of which each rank has its own
shards     a DTensor: what this rank holds of it, and who holds the same
agreement  which ranks have which replicated value; settled once for each structure of the state
share      which leaves, or rows of them, this rank writes
naming     which of them, and of those that others write, its structure names
notes      what they tell each other of a save
outcome    how a save ends: the same way on every rank, in bounded time
"""
