"""Entry point: parses, hands over to the command's module, turns errors into one line."""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from fastllm.cli.options import parser


class CliError(Exception):
    """What the user can put right: printed as one line, exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit code 0; 1: a check failed; 2: an error; 130: interrupted."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed: help, the version or one line
        return end.code if isinstance(end.code, int) else 2
    warnings.simplefilter("ignore")  # torch's, about dtypes that a test mixes on purpose
    try:
        # a command's imports are heavy: only the one that runs pays for them
        code = importlib.import_module(f"fastllm.cli.{args.command}").run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say(args.command, "interrupted; nothing was left half written")
        return 130
    except BrokenPipeError:
        # the reader has gone (`| head`): keep Python from complaining again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("FASTLLM_TRACEBACK"):
            raise
        known = isinstance(error, CliError | OSError)
        text = " ".join(str(error).split()) or type(error).__name__
        hint = "" if known else f" ({type(error).__name__}; FASTLLM_TRACEBACK=1 shows where)"
        _say(args.command, f"{text}{hint}")
        return 2


def _say(command: str, text: str) -> None:
    print(f"fastllm {command}: {text}", file=sys.stderr)
