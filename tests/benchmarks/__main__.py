"""``python -m tests.benchmarks``: the same program as ``stager bench``."""

from __future__ import annotations

import sys

from stager.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
