"""`python -m fastllm` is the command `fastllm`."""

import sys

from fastllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
