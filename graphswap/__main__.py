"""`python -m graphswap`: the command line."""

import sys

from graphswap.tools import graphswap_cli

if __name__ == "__main__":
    sys.exit(graphswap_cli.main())
