"""`python -m bench.readme`: rewrites the README's table from bench/results/*.json."""

import sys
from pathlib import Path

from fastllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--readme", str(Path(__file__).parent.parent / "README.md")]))
