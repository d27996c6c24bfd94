"""``python -m near``: the command line."""

import sys

from near.cli import main

sys.exit(main())
