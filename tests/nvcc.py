"""What nvcc makes of a source, kept under build/nvcc by a digest of sources, flags and nvcc: made
once, whoever asks first."""

from __future__ import annotations

import functools
import hashlib
import re
import runpy
import subprocess
from pathlib import Path

from simt import build

CACHE = build.REPOSITORY / "build" / "nvcc"
STRICT = ("--Werror", "all-warnings")


@functools.cache
def setup_py() -> dict:
    return runpy.run_path(str(build.REPOSITORY / "setup.py"))


def find_nvcc() -> Path | None:
    """The toolkit that setup.py would build with."""
    for root, _ in setup_py()["find_toolkits"]():
        return Path(root) / "bin/nvcc"
    return None


@functools.cache
def _version_of(nvcc: Path) -> str:
    return subprocess.run(
        [str(nvcc), "--version"], check=True, capture_output=True, text=True
    ).stdout


def made(nvcc: Path, source: Path, suffix: str, *flags: str) -> Path:
    """The file that nvcc makes with these flags. Beside it, as .log, is what nvcc said."""
    digest = hashlib.sha256("\0".join((_version_of(nvcc), *flags)).encode())
    for path in sorted(build.included(source, [])):
        digest.update(path.read_bytes())
    target = CACHE / f"{source.stem.split('-')[0]}-{digest.hexdigest()[:24]}{suffix}"

    def make(path: Path) -> None:
        done = subprocess.run(
            [str(nvcc), *flags, str(source), "-o", str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        log = done.stdout + done.stderr
        assert done.returncode == 0, f"nvcc {' '.join(flags)} {source.name}:\n{log[-4000:]}"
        target.with_suffix(".log").write_text(log)

    return build.made_once(target, make)


def cubin(nvcc: Path, kernel: str, architecture: str) -> Path:
    """The machine code of a kernel, by way of the PTX that setup.py has nvcc make it from."""
    listed = {name.partition("+")[0]: name for name in setup_py()["ARCHES"]}
    flag = setup_py()["gencode"](listed.get(architecture, architecture))
    virtual = re.search(r"arch=(compute_\w+)", flag)[1]
    source = build.REPOSITORY / f"csrc/kernels/{kernel}.cu"
    ptx = made(nvcc, source, ".ptx", "-ptx", "-std=c++17", "-O3", f"-arch={virtual}", *STRICT)
    sm = "sm_" + architecture.replace(".", "")
    return made(nvcc, ptx, ".cubin", "-cubin", "-O3", f"-arch={sm}", "-Xptxas", "-v", *STRICT)
