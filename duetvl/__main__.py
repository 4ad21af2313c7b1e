"""`python -m duetvl` is the command `duetvl`."""

import sys

from duetvl.cli import main

sys.exit(main())
