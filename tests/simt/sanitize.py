"""Runs pytest with the emulator's libraries built by AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/simt/sanitize.py tests/test_emulator.py -q

Python itself is not instrumented, so the sanitizers' run-time library is preloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys

from build import compiler


def runtime(name: str) -> str:
    path = subprocess.run(
        [compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f"{compiler()} has no {name}: install its sanitizer libraries")
    return path


def main() -> None:
    environment = {
        **os.environ,
        "SIMT_SANITIZE": "1",
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # CPython keeps memory to the end; its allocations are not what is tested here.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
