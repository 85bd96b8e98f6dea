"""`python -m xcomposer` is the command `xcomposer`."""

import sys

from xcomposer.cli import main

if __name__ == "__main__":
    sys.exit(main())
