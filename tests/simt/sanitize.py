"""Runs pytest with the emulator's libraries built by Address- and UndefinedBehaviorSanitizer.

python tests/simt/sanitize.py tests/test_emulator.py -q
"""

from __future__ import annotations

import os
import sys

from build import preloaded


def main() -> None:
    environment = {
        **os.environ,
        "SIMT_SANITIZE": "1",
        "LD_PRELOAD": preloaded("libasan.so", "libubsan.so"),
        # CPython keeps memory to the end; its allocations are not what is tested here.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
