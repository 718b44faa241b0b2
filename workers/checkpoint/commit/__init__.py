"""From receipts to a visible checkpoint.

``persist.py`` writes a part and, if it is the last, commits; ``commit.py`` makes manifest and rename; ``merge.py`` puts
together what ranks contributed; ``replica.py`` writes a part from a partner's memory.
"""
