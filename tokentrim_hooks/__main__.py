"""``python -m tokentrim_hooks``: the command line."""

import sys

from tokentrim_hooks.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
