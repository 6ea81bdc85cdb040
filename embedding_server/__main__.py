"""`python -m embedding_server`: the same as the console script."""

import sys

from embedding_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
