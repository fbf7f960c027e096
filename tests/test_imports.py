"""The house's rules: imports point down, importing is cheap and patches nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import fastllm

ROOT = Path(fastllm.__file__).parent
# a layer may import from itself and from those before it
LAYERS = [
    "_C",
    "_cuda",
    "kernels",
    "core",
    "ops",
    "functional",
    "nn",
    "optim",
    "quant",
    "swap",
    "cli",
]


def layer(name):
    return LAYERS.index(name) if name in LAYERS else None


def imported(path):
    """Modules of fastllm that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def test_imports_point_down():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        own = layer(path.relative_to(ROOT).parts[0].removesuffix(".py"))
        if own is None:  # __init__.py and __main__.py of the package see everything
            continue
        for module in imported(path):
            parts = module.split(".")
            if parts[0] != "fastllm":
                continue
            other = layer(parts[1])
            if other is None or other > own:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_only_torch_and_triton():
    kernels = Path(sys.modules["fastllm"].__file__).parent.parent / "kernels"
    for path in sorted(kernels.glob("*.py")) if kernels.exists() else []:
        for module in imported(path):
            top = module.split(".")[0]
            allowed = top in ("torch", "triton") or top in sys.stdlib_module_names
            assert allowed or module.startswith("fastllm.kernels"), f"{path.name} imports {module}"


def test_import_is_quiet_and_lazy():
    """No Triton, no transformers, no rich, no change to torch, no output."""
    code = """
import torch
before = {k: id(v) for k, v in vars(torch.nn.functional).items()}
classes = {k: id(v) for k, v in vars(torch.nn).items()}
import sys
had = set(sys.modules)
import fastllm
assert before == {k: id(v) for k, v in vars(torch.nn.functional).items()}
assert classes == {k: id(v) for k, v in vars(torch.nn).items()}
new = {m.split(".")[0] for m in set(sys.modules) - had}
heavy = new & {"triton", "transformers", "rich", "matplotlib", "numpy", "accelerate"}
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_public_functions_are_documented():
    for name in fastllm.functional.__all__:
        assert getattr(fastllm.functional, name).__doc__, name
