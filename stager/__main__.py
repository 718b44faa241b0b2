"""``python -m stager``: the command line."""

from stager.cli import main

if __name__ == "__main__":
    main()
