"""`python -m stillroom.pipeline` is the `stillroom` command."""

import sys

from stillroom.pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
