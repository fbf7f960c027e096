"""The argument parser. Imports nothing heavy, so that --help is quick."""

import argparse
import math
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "info": "what this machine has, and which backends can run on it",
    "check": "prove every kernel that can run here against float64",
    "bench": "time the kernels against stock PyTorch and the limits of the machine",
    "tune": "measure which backend and which config wins here, and keep it",
    "demo": "a real encoder and a small Llama, stock against swapped, measured",
}
_DETAIL = {
    "info": """\
Shows the CPU and its instruction set level, GPUs, versions, which backend can
run each op (and why the others cannot), the output pool, and the environment
variables that matter.""",
    "check": """\
Runs the ops' test cases on every backend that can run here (the CPU kernels on
every instruction set level), forward and backward, and compares with a float64
reference: the error may be at most twice that of stock PyTorch in the same
dtype. Exit code 1 when one exceeds it.""",
    "bench": """\
Times ours (the automatic choice) against stock eager PyTorch, torch.compile and
the peers that are installed, in interleaved rounds, and against the copy
bandwidth measured beside them. What fails its cases on this machine gets no
speedup; what loses is marked.""",
    "tune": """\
Times the backends that can serve a call, and the configs of a kernel, against
one another and keeps what wins in a table of yours (FASTLLM_CACHE_DIR), which
every later process uses. Ordinary calls never measure. What the table knows is
skipped, so a run that was interrupted goes on where it was.""",
    "demo": """\
Swaps fastllm into a pretrained sentence encoder and into a small Llama that
trains from scratch on Python's own documentation, beside an untouched copy of
each, and measures both. Uses no network.""",
}
_EXAMPLES = {
    "info": ["fastllm info"],
    "check": ["fastllm check", "fastllm check rms_norm --exhaustive"],
    "bench": [
        "fastllm bench --quick",
        "fastllm bench norm --op rms_norm --dtype bf16 --threads 1",
        "fastllm bench --compare before.json after.json",
        "fastllm bench --out bench/results && fastllm bench --readme README.md",
    ],
    "tune": [
        "fastllm tune",
        "fastllm tune norm --shapes 2048x768 --budget 60",
        "fastllm tune --model train:model_and_batch",
    ],
    "demo": ["fastllm demo --out report", "fastllm demo --quick"],
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of `fastllm`; the chosen command is in `.command`."""
    top = Parser(
        prog="fastllm",
        description="Fused kernels that make PyTorch models train and run faster on what you have.",
        epilog="Each command has its own help: fastllm bench --help",
    )
    top.add_argument("--version", action="version", version=f"fastllm {_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        examples = "\n  ".join(_EXAMPLES[name])
        sub = commands.add_parser(
            name,
            help=summary,
            description=_DETAIL[name],
            epilog=f"examples:\n  {examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _ADD[name](sub)
    return top


def _check(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("op", nargs="*", help="ops to check (default: all)")
    sub.add_argument("--backend", metavar="NAME", help="only this backend")
    sub.add_argument("--exhaustive", action="store_true", help="the large cases, too: many minutes")
    _threads(sub, "CPU threads (default: 2, for work that is split; more only wait for each other)")


def _bench(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("family", nargs="?", help="a family of ops, such as norm (default: all)")
    sub.add_argument("--op", metavar="NAME", help="only this op")
    sub.add_argument("--case", metavar="TEXT", help="only cases with TEXT in their name: 4096x4096")
    sub.add_argument("--dtype", metavar="NAME", help="only this dtype: fp32, bf16, fp16")
    sub.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: a GPU if any)")
    _threads(sub, "this many CPU threads (default: all, and then one)")
    sub.add_argument(
        "--quick", action="store_true", help="one case an op and dtype; under five minutes"
    )
    sub.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help="time for the whole run, shared by its rows (default: 3600, quick: 240)",
    )
    sub.add_argument(
        "--fresh", action="store_true", help="do not go on with a run that was cut off"
    )
    sub.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="write DIR/<device>.json, .md and .html"
    )
    sub.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measure nothing; what is slower in B than in A beyond both runs' noise (exit code 1)",
    )
    sub.add_argument("--force", action="store_true", help="compare runs of different devices")
    sub.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="measure nothing; rewrite FILE's table from the bench/results beside it",
    )


def _tune(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("family", nargs="*", help="families of ops, or ops (default: all)")
    sub.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="tune what a model calls: FACTORY() gives (model, example inputs)",
    )
    sub.add_argument(
        "--shapes",
        nargs="+",
        metavar="SIZES",
        help="sizes of the ops' dimensions, 2048x768, instead of their test cases",
    )
    sub.add_argument("--budget", type=_seconds, metavar="SECONDS", help="stop after so long")
    sub.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: a GPU if any)")
    _threads(sub, "this many CPU threads (default: all, and then one)")
    sub.add_argument("--again", action="store_true", help="measure what is known already, too")
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="write a table to DIR (fastllm/tables ships it)"
    )


def _demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, metavar="DIR", help="write DIR/demo.md and DIR/demo.png")
    sub.add_argument(
        "--seconds",
        type=_seconds,
        default=None,
        help="time for measuring, shared by the two halves (default: 80)",
    )
    sub.add_argument("--quick", action="store_true", help="a glimpse: rough figures, soon")
    _threads(sub)


def _threads(sub: argparse.ArgumentParser, text: str = "CPU threads (default: torch's)") -> None:
    sub.add_argument("--threads", type=_count, metavar="N", help=text)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 4096, found {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, found {text!r}")
    return value


def _version() -> str:
    try:
        return version("fastllm-kernels")
    except PackageNotFoundError:
        return "(not installed)"


_ADD = {"info": lambda sub: None, "check": _check, "bench": _bench, "tune": _tune, "demo": _demo}
