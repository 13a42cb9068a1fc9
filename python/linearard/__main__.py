"""`python -m linearard`, for torchrun and other launchers."""

import sys

from linearard.cli import main

sys.exit(main())
