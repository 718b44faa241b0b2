"""Write ``docs/mistakes.md``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["STAGER_WORKERS__COUNT"] = "1"

if __name__ == "__main__":
    from tests.mistakes.page import PAGE, page

    with tempfile.TemporaryDirectory() as directory:
        back = os.getcwd()
        text = page(Path(directory))
        os.chdir(back)
    PAGE.write_text(text)
    print(f"wrote {PAGE}")
