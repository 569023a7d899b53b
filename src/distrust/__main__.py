"""``python -m distrust`` is the command ``distrust``."""

import sys

from distrust.cli import main

sys.exit(main())
