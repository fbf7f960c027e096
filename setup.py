"""Builds the compiled parts: fastllm._C (always) and fastllm._cuda (with nvcc on the PATH).

Metadata lives in pyproject.toml. Environment:
  FASTLLM_CUDA=0|1       never | always build the CUDA kernels (default: when nvcc is found)
  FASTLLM_CUDA_ARCHS     compute capabilities, "80;90" by default; PTX of the last one is added
  CXX, CXXFLAGS          the C++ compiler and extra flags
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
DOT_FAMILIES = (
    "gemm",
    "attention",
    "loss",
    "qgemm",
    "sparse",
    "peak",
)  # with kernels of their own at avx512_bf16 and amx (csrc/cpu/isa.h)
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def find_nvcc():
    """The path of nvcc to build with, or None with a note that says why there is none."""
    wish = os.environ.get("FASTLLM_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"FASTLLM_CUDA: expected 0 or 1, found {wish!r}")
    nvcc = None if wish == "0" else shutil.which("nvcc")
    if wish == "1" and nvcc is None:
        raise SystemExit("FASTLLM_CUDA=1 asks for the CUDA kernels, but nvcc is not on the PATH")
    if nvcc is None:
        reason = "FASTLLM_CUDA=0" if wish == "0" else "nvcc is not on the PATH"
        print(f"fastllm: CUDA C++ kernels are skipped: {reason}", file=sys.stderr)
    return nvcc


def cuda_root(nvcc):
    """The toolkit that nvcc itself says it uses (the one on the PATH may be a wrapper)."""
    done = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    for line in done.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(os.path.realpath(nvcc)).parent.parent


def gencode():
    """nvcc's -gencode flags for FASTLLM_CUDA_ARCHS."""
    archs = os.environ.get("FASTLLM_CUDA_ARCHS", "80;90").replace(",", ";").replace(".", "")
    archs = [a.strip() for a in archs.split(";") if a.strip()]
    if not archs or not all(a.rstrip("af").isdigit() for a in archs):
        raise SystemExit(f"FASTLLM_CUDA_ARCHS: expected a list such as '80;90', found {archs}")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class NinjaBuild(build_ext):
    """Compiles every extension in one parallel ninja run."""

    def build_extensions(self):
        import pybind11

        cxx = os.environ.get("CXX", "g++" if shutil.which("g++") else "c++")
        includes = [CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = [
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            *WARNINGS,
        ]
        flags += [f"-I{path}" for path in includes] + shlex.split(os.environ.get("CXXFLAGS", ""))
        flags += ["-fopenmp"]
        lines = [
            f"rule cxx\n  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = C++ $in",
            f"rule link\n  command = {cxx} -shared $in -o $out $libs\n  description = link $out",
        ]
        nvcc = self.nvcc
        if nvcc:
            lines.append(
                f"rule cuda\n  command = {nvcc} $flags -MMD -MF $out.d -c $in -o $out\n"
                "  depfile = $out.d\n  deps = gcc\n  description = CUDA $in"
            )
        temp = Path(self.build_temp).resolve()
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            objects = []
            for source, family in variants(ext.sources):
                obj = temp / ext.name / f"{source.name}{family and '.' + family}.o"
                if source.suffix == ".cu":
                    own = [
                        "-O3",
                        "-std=c++17",
                        "-lineinfo",
                        f"-I{CSRC}",
                        "-Xcompiler=-fPIC",
                        *gencode(),
                    ]
                    rule = "cuda"
                else:
                    own, rule = [*flags, *ext.extra_compile_args], "cxx"
                    own += [f"-DFAMILY={family}"] if family else []
                    own += [f"-DFASTLLM_SOURCES={hashes()}"] if source.name == "module.cpp" else []
                lines.append(
                    f"build {esc(obj)}: {rule} {esc(ROOT / source)}\n  flags = {' '.join(own)}"
                )
                objects.append(esc(obj))
            libs = " ".join(["-fopenmp", *ext.extra_link_args])
            lines.append(f"build {esc(target)}: link {' '.join(objects)}\n  libs = {libs}")
        temp.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [find_ninja(), "-C", str(temp)]
        if self.parallel:
            command += ["-j", str(self.parallel)]
        subprocess.run(command, check=True)


def variants(sources):
    """(source, kernel family) to compile: a level of the CPU kernels once a family, others once."""
    families = sorted(path.stem for path in (CSRC / "cpu" / "kernels").glob("*.h"))
    for source in map(Path, sources):
        wanted = families if source.name.startswith("level_") else [""]
        if source.stem in ("level_avx512_bf16", "level_amx"):
            wanted = [family for family in families if family in DOT_FAMILIES]
        for family in wanted:
            yield source, family


def hashes():
    """name:hash of each name's kernel sources, comments aside: what a measurement holds for."""
    found = {}
    for path in sorted((CSRC / "cpu" / "kernels").iterdir()):
        code = " ".join(re.sub(r"//.*", "", path.read_text()).split())
        found.setdefault(path.stem, hashlib.sha256()).update(code.encode())
    return ",".join(f"{name}:{text.hexdigest()[:12]}" for name, text in found.items())


def find_ninja():
    """The ninja of the build environment, else the one on the PATH."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return "ninja"


def esc(path):
    """A path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def sources(folder, *suffixes):
    """Source files of one folder of csrc/, relative to the root, in a fixed order."""
    return sorted(str(p.relative_to(ROOT)) for p in folder.iterdir() if p.suffix in suffixes)


NVCC = find_nvcc()
NinjaBuild.nvcc = NVCC
folders = (CSRC, CSRC / "bindings", CSRC / "cpu")
extensions = [Extension("fastllm._C", [s for f in folders for s in sources(f, ".cpp")])]
if NVCC:
    root = cuda_root(NVCC)
    libs = next(p for p in (root / "lib64", root / "lib") if p.exists())
    extensions.append(
        Extension(
            "fastllm._cuda",
            sources(CSRC / "cuda", ".cpp", ".cu"),
            extra_compile_args=[f"-I{root / 'include'}"],
            extra_link_args=[f"-L{libs}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
        )
    )

setup(
    packages=[*find_packages(include=["fastllm", "fastllm.*"]), "fastllm.kernels"],
    package_dir={"fastllm.kernels": "kernels"},
    package_data={"fastllm": ["tables/*.json"]},
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
