"""`python -m tvmerge`."""

import sys

from tvmerge.cli import main

sys.exit(main())
