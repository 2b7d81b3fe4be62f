"""``python -m popmm.cli``."""

import sys

from popmm.cli.main import main

sys.exit(main())
