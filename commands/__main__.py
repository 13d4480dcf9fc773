"""``python -m moesurg.commands`` is ``moesurg``."""

import sys

from .app import main

sys.exit(main())
