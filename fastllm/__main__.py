"""`python -m fastllm` is the command `fastllm`."""

import os
import sys

from fastllm.cli import main

if __name__ == "__main__":
    # the installed command does not import from the current folder either: in a checkout, `kernels`
    # there would pass for the package of that name that transformers looks for
    if sys.path and os.path.realpath(sys.path[0] or ".") == os.path.realpath("."):
        del sys.path[0]
    sys.exit(main())
