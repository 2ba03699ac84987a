"""Builds batchrenorm_cuda._C, one extension module, for whatever torch and CUDA toolkit are there.

BATCHRENORM_CUDA=0/1   without / with the CUDA kernels; unset: with them if a toolkit is found
CUDA_HOME              the toolkit; unset: CUDA_PATH, nvcc on PATH, /usr/local/cuda, pip's packages
TORCH_CUDA_ARCH_LIST   as in "8.0;9.0+PTX"; unset: the visible GPUs, else ARCHES
MAX_JOBS CXX CXXFLAGS  compilers at a time (one a core), which one (c++), more flags for it
"""

import os
import re
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from subprocess import call, getoutput

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

# By default, and of which PTX: it is 60% of nvcc's work, and the same for several of them.
ARCHES = {"7.5": 75, "8.0": 80, "8.6": 80, "8.9": 80, "9.0": 80, "10.0+PTX": 100, "12.0": 100}
BINDING = ["csrc/binding/schema.cpp", "csrc/binding/cpu.cpp", "csrc/binding/introspection.cpp"]
PASSES = "forward backward inference moments merge backward_sums backward_project".split()
CPU = [f"csrc/cpu/{n}.cpp" for n in [*PASSES, "isa", "isa_baseline", "isa_avx2", "isa_avx512"]]
CUDA = ["csrc/binding/cuda.cpp", *(f"csrc/kernels/{name}.cu" for name in PASSES)]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11
LINK = {"linux": "-shared -Wl,--no-as-needed,--exclude-libs,ALL"}
LINK["darwin"] = "-bundle -undefined dynamic_lookup"

# Without errno and traps loops become vectors: 9% of (1, 2048, 7, 7) forward; aligned: up to 8%.
NINJA = """builddir = {out}
cpp = {cxx} -std=c++17 -O3 -falign-loops=64 -fno-math-errno -fno-trapping-math $
      -fPIC -fvisibility=hidden {flags}
cu = {cuda}/bin/nvcc -ccbin {cxx} -std=c++17 -O3 -lineinfo {gencode} --threads {threads} $
      -Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden
rule compile
  command = $compiler $defines -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = {cxx} $in -o $out {link} -L{torch}/lib -ltorch -ltorch_cpu
  description = $out
"""


def find_torch() -> tuple[Path, str, str | None]:
    """Root, version and CUDA version of torch, read without importing it, which takes seconds."""
    spec, about = find_spec("torch"), {"__version__": "none"}
    if spec is not None and spec.origin is not None:
        about = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    version = about["__version__"]
    if [int(n) for n in re.findall(r"\d+", version)[:2]] < [2, 11]:
        sys.exit(f"error: needs torch 2.11 or newer to compile against, found {version}. Run\n"
                 "  pip install -U torch ninja && pip install --no-build-isolation .")  # fmt: skip
    return Path(spec.origin).parent, version, about["cuda"]


def find_toolkits() -> Iterator[tuple[Path, str]]:
    """Root and version of every CUDA toolkit: nvcc with headers beside it (it may be a wrapper)."""
    nvcc, nvidia = shutil.which("nvcc"), find_spec("nvidia")
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    roots += [nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for packages in (nvidia and nvidia.submodule_search_locations) or []:
        roots += sorted(Path(packages).glob("cu[0-9]*"))
    for root in map(Path, filter(None, roots)):
        release = re.search(r"release ([\d.]+)", getoutput(f"'{root}/bin/nvcc' --version"))
        if release and (root / "include/cuda_runtime_api.h").is_file():
            yield root, release[1]


def choose_toolkit(torch_version: str, torch_cuda: str | None) -> tuple[Path | None, str, str]:
    """Root and version of the toolkit to build with, or None; and why."""
    if (requested := os.environ.get("BATCHRENORM_CUDA")) == "0":
        return None, "", "BATCHRENORM_CUDA=0"
    if not (toolkits := list(find_toolkits())):
        if requested:
            sys.exit("error: BATCHRENORM_CUDA=1, but no toolkit is found. Set CUDA_HOME to one.")
        return None, "", "no CUDA toolkit found; to use one, set CUDA_HOME and build again"
    for root, version in toolkits:
        if torch_cuda is None or version.split(".")[0] == torch_cuda.split(".")[0]:
            return root, version, f"nvcc {version} in {root}"
    sys.exit(f"error: torch {torch_version} is for CUDA {torch_cuda}, {root} is {version}. One of\n"
             f"  export CUDA_HOME=...         # a toolkit {torch_cuda.split('.')[0]}.x\n"
             f"  export BATCHRENORM_CUDA=0    # CPU kernels alone\n"
             f"or install a torch for CUDA {version} (pytorch.org, Get Started)")  # fmt: skip


def choose_architectures(nvcc: Path) -> tuple[list[str], str]:
    if (listed := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ")) not in ("", "native"):
        wanted = re.split(r"[;, ]+", listed)
        if wrong := [a for a in wanted if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", a)]:
            sys.exit(f"error: TORCH_CUDA_ARCH_LIST must look like 8.0;9.0+PTX, got {wrong[0]!r}")
        return wanted, "TORCH_CUDA_ARCH_LIST"
    listing = getoutput(f"'{nvcc}' --list-gpu-arch")
    known = [f"{a}.{b}" for a, b in re.findall(r"compute_(\d+)(\d)\b", listing)]
    seen = getoutput("nvidia-smi --query-gpu=compute_cap --format=csv,noheader")
    if gpus := set(re.findall(r"^\d+\.\d$", seen, re.M)):
        newer = [] if gpus <= set(known) else [known[-1] + "+PTX"]  # than nvcc: through PTX
        return sorted(gpus & set(known)) + newer, "the visible GPUs"
    return [a for a in ARCHES if a.split("+")[0] in known], "no GPU visible"


def gencode(arch: str) -> str:
    name, _, ptx = arch.replace(".", "").partition("+")
    alike = ARCHES.get(arch, name)
    return f"'-gencode=arch=compute_{alike},code=[sm_{name}{f',compute_{alike}' if ptx else ''}]'"


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch, torch_version, torch_cuda = find_torch()
        cuda, nvcc, why = choose_toolkit(torch_version, torch_cuda)
        arches, seen = choose_architectures(cuda / "bin/nvcc") if cuda else ([], "")
        what = f"CPU and CUDA kernels for {';'.join(arches)} ({seen}; " if cuda else "CPU kernels ("
        print(f"batchrenorm_cuda: {what}{why}), against torch {torch_version}", flush=True)
        flags = f"-W -Wall -isystem {torch}/include -isystem {sysconfig.get_path('include')}"
        flags += f" -isystem {cuda}/include" * bool(cuda) + " " + os.environ.get("CXXFLAGS", "")
        link = LINK.get(sys.platform) or sys.exit("error: needs Linux, macOS or, on Windows, WSL 2")
        if cuda:  # the static runtime: torch may have none, or another minor version
            link += f" -L{cuda}/lib64 -L{cuda}/lib -lcudart_static -lrt -ldl -lpthread"
        jobs, cxx = int(os.environ.get("MAX_JOBS") or os.cpu_count()), os.environ.get("CXX", "c++")
        out = Path("build", f"{sys.implementation.cache_tag}-torch-{torch_version}-{nvcc or 'cpu'}")
        text = NINJA.format(out=out, cxx=cxx, flags=flags, link=link, cuda=cuda, torch=torch,
                            gencode=" ".join(map(gencode, arches)), threads=max(1, jobs // 3))
        about = f"-DBRN_VERSION={self.distribution.get_version()} -DBRN_TORCH={torch_version}"
        about += f" -DBRN_NVCC={nvcc} -DBRN_ARCHITECTURES={','.join(arches)}"
        sources = BINDING + CPU + (CUDA if cuda else ["csrc/binding/no_cuda.cpp"])
        for name in sources:
            text += f"build {out}/{name}.o: compile {name}\n  compiler = ${name.split('.')[1]}\n"
            text += f"  defines = {about if 'introspection' in name else STABLE_ABI}\n"
        text += f"build {out}/_C.so: link {' '.join(f'{out}/{source}.o' for source in sources)}\n"
        out.mkdir(parents=True, exist_ok=True)
        (out / "build.ninja").write_text(text)
        find_spec("ninja") or sys.exit("error: needs ninja to build. Run\n  pip install ninja")
        if call([sys.executable, "-m", "ninja", f"-j{jobs}", f"-f{out}/build.ninja"]):
            sys.exit("error: the build failed; the first error is above")
        self.force, target = True, self.get_ext_fullpath(ext.name)  # also over a newer file
        self.mkpath(os.path.dirname(target))
        self.copy_file(str(out / "_C.so"), target)  # a new file: a process may have the old mapped


if __name__ == "__main__":
    if int(__version__.split(".")[0]) < 77:
        sys.exit("error: needs setuptools 77 or newer. Run\n  pip install 'setuptools>=77,<82'")
    setup(ext_modules=[Extension("batchrenorm_cuda._C", [])], cmdclass={"build_ext": Build})
