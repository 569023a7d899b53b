"""``python -m campaigns.long_run``."""

import sys

from campaigns.long_run import main

if __name__ == "__main__":
    sys.exit(main())
