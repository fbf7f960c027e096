"""Peak memory of training, each variant alone in a process of its own.

Two models in one process would share, and hide, one peak. On a CPU the figure is the process's peak
resident memory, as the kernel keeps it: torch's own counters see neither malloc's leftovers nor a
pool. On a GPU it is what torch's allocator had allocated at most.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
from fastllm.cli.demo.memory import main
sys.path.pop()
main()
"""


@dataclass(frozen=True)
class Memory:
    """Bytes: before the first step (imports, model, swap), and at the peak of training."""

    before: int
    peak: int


def peaks(
    variants: tuple[str, ...], quick: bool, device: str, threads: int | None, steps: int = 6
) -> tuple[dict[str, Memory], str | None]:
    """The variants' memory; or nothing, and why. They run side by side: no clock is running."""
    children = {}
    try:
        for variant in variants:
            command = [sys.executable, "-c", _CHILD, json.dumps(_import_path()), variant]
            command += ["--steps", str(steps), "--device", device, *(["--quick"] if quick else [])]
            command += ["--threads", str(threads)] if threads else []
            pipe = subprocess.PIPE
            children[variant] = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        return {variant: _finish(child) for variant, child in children.items()}, None
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return {}, str(error)
    finally:  # an interrupt as well: nobody is left behind
        for child in children.values():
            child.kill()
            child.communicate()


def _import_path() -> list[str]:
    """This process's, without the current folder, and at last where this very package lies.

    The child takes that off again once it has the package: a checkout has other folders beside it.
    """
    return [*filter(None, sys.path), str(Path(__file__).resolve().parents[3])]


def _finish(child: subprocess.Popen) -> Memory:
    out, err = child.communicate(timeout=300)
    if child.returncode:
        lines = err.strip().splitlines() or [f"exit code {child.returncode}"]
        raise RuntimeError(lines[-1])
    return Memory(**json.loads(out.splitlines()[-1]))


def train(variant: str, quick: bool, device: str, steps: int) -> Memory:
    """Trains a few steps in this process and reads what it took."""
    import torch

    from fastllm.cli.demo.encoder import SWAPPED
    from fastllm.cli.demo.llama import QUICK, Size, Trainer

    gpu = torch.device(device).type == "cuda"
    trainer = Trainer(QUICK if quick else Size(), device, variant == SWAPPED, verify=False)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if gpu else _resident("VmRSS")
    for _ in range(steps):
        trainer.step()
    return Memory(before, torch.cuda.max_memory_allocated(device) if gpu else _resident("VmHWM"))


def _resident(field: str) -> int:
    """Bytes of /proc's VmRSS or VmHWM; elsewhere, the peak that getrusage knows."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """The child's side: trains one variant and prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    print(json.dumps(asdict(train(args.variant, args.quick, args.device, args.steps))))
