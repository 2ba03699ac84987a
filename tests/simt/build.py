"""Compiles the shipped .cu files with g++ against the stand-in CUDA headers of this directory.

Objects and libraries are cached under ``build/simt`` by a digest of the flags, the source and every
project header it includes, so that a change, or the planted bugs of test_planted_bugs.py, recompile
what they touch and nothing else.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sysconfig import get_path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / "build" / "simt"
KERNELS = (
    "csrc/kernels/forward.cu",
    "csrc/kernels/backward.cu",
    "csrc/kernels/inference.cu",
    "csrc/kernels/moments.cu",
    "csrc/kernels/merge.cu",
    "csrc/kernels/backward_sums.cu",
    "csrc/kernels/backward_project.cu",
)
SOURCES = (*KERNELS, "tests/simt/entry.cpp")
EMULATOR = (
    "tests/simt/block.cpp",
    "tests/simt/fiber.cpp",
    "tests/simt/grid.cpp",
    "tests/simt/launch.cpp",
)
# Without optimisation the kernels' templates are 20 times slower; above -O1 they only take longer
# to compile.
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# The kernels alone are instrumented: the emulator says itself which of its switches order memory.
RACES = ("-fsanitize=thread",)
RACES_EMULATOR = ("-DSIMT_TSAN",)

_INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def _compiler_version(cxx: str) -> str:
    return subprocess.run([cxx, "--version"], check=True, capture_output=True, text=True).stdout


def included(source: Path, search: Iterable[Path]) -> list[Path]:
    """``source`` and every file of the project that it includes, directly or not."""
    found: dict[Path, None] = {}
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found[path] = None
        for name in _INCLUDE.findall(path.read_text()):
            for directory in (path.parent, *search):
                if (directory / name).is_file():
                    pending.append((directory / name).resolve())
                    break
    return list(found)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def made_once(target: Path, make: Callable[[Path], object]) -> Path:
    """``target``, which ``make(path)`` makes under another name if it is not there yet: one process
    at a time, and the others find it made."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}{target.suffix}")
            try:
                make(part)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def compile_object(source: Path, root: Path, flags: tuple[str, ...]) -> Path:
    include = root / "tests/simt/include"
    cxx = compiler()
    contents = [
        part
        for path in sorted(included(source, [include]))
        for part in (os.path.relpath(path, root), path.read_bytes())
    ]
    target = CACHE / f"{source.stem}-{_digest(_compiler_version(cxx), *flags, *contents)}.o"
    command = [cxx, *flags, f"-I{include}", "-x", "c++", "-c", str(source), "-o"]
    return made_once(target, lambda path: _run([*command, str(path)]))


def library(
    root: Path = REPOSITORY,
    *,
    sanitize: bool = False,
    races: bool = False,
    defines: tuple[str, ...] = (),
    sources: Iterable[str] = SOURCES,
    jobs: int = 2,
) -> Path:
    """Builds what is not there yet and returns the shared library: ``sources`` and the emulator.

    ``root`` holds csrc/ and tests/simt/. ``sanitize`` and ``races`` need the sanitizers' run-time
    libraries preloaded: see ``preloaded``.
    """
    flags = FLAGS + (SANITIZE if sanitize else ()) + defines
    tasks = [(name, flags + (RACES if races else ())) for name in sources]
    tasks += [(name, flags + (RACES_EMULATOR if races else ())) for name in EMULATOR]
    linked = ["-shared", "-pthread", *(SANITIZE if sanitize else ())]
    if not sanitize and not races:
        linked.append("-Wl,-z,defs")
    return _link(root, tasks, linked, jobs)


def binding(jobs: int = 2) -> Path:
    """The library of binding.cpp: the CUDA operators on the emulator, for this process's torch."""
    import torch

    installed = Path(torch.__file__).parent
    flags = (*FLAGS, "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000")
    flags += tuple(f"-isystem{path}" for path in (installed / "include", get_path("include")))
    # The digest knows the headers of the project alone.
    flags += (f"-DTORCH={torch.__version__}",)
    tasks = [(name, FLAGS) for name in (*KERNELS, *EMULATOR)] + [("tests/simt/binding.cpp", flags)]
    # Its own stand-ins, where a torch with CUDA has functions of the same name.
    linked = ["-shared", "-pthread", "-Wl,-Bsymbolic", "-Wl,-z,defs", "-Wl,--no-as-needed"]
    linked += [f"-L{installed / 'lib'}", "-ltorch", "-ltorch_cpu"]
    return _link(REPOSITORY, tasks, linked, jobs)


def _link(
    root: Path, tasks: list[tuple[str, tuple[str, ...]]], flags: list[str], jobs: int
) -> Path:
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda t: compile_object(root / t[0], root, t[1]), tasks))
    target = CACHE / f"libsimt-{_digest(*flags, *(o.name for o in objects))}.so"
    libraries = [f for f in flags if f.startswith("-l")]
    first = [f for f in flags if f not in libraries]
    command = [compiler(), *first, *map(str, objects), *libraries, "-o"]
    return made_once(target, lambda path: _run([*command, str(path)]))


def preloaded(*names: str) -> str:
    """LD_PRELOAD for these run-time libraries of the compiler; Python is not instrumented."""
    paths = []
    for name in names:
        command = [compiler(), f"-print-file-name={name}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        paths.append(done.stdout.strip())
        if not os.path.isabs(paths[-1]):
            raise RuntimeError(f"{compiler()} has no {name}: install its sanitizer libraries")
    return " ".join(paths)
