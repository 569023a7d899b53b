"""``python -m distrust`` is the command ``distrust``."""

import os
import sys

from distrust.cli import main

code = main()
if code and "RANK" in os.environ:
    # A thread that still waits for another rank, in native code, would abort the interpreter's end.
    os._exit(code)
sys.exit(code)
