"""The order of the source tree: who may include what, and a list of what is there."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CUDA = {"cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"}
SYSTEM = r"[a-z_]+"  # <vector>: no extension, no folder

# Where a file is: the folders of quoted includes, and other headers, that it may name.
RULES = {
    "csrc/core/*": ({"csrc/core"}, set()),
    "csrc/kernels/launch.h": ({"csrc/core"}, set()),
    "csrc/kernels/*": ({"csrc/core", "csrc/kernels"}, {*CUDA, "cuda_pipeline_primitives.h"}),
    "csrc/cpu/*": ({"csrc/core", "csrc/cpu", "csrc/kernels/launch.h"}, {"sys/mman.h", "unistd.h"}),
    "csrc/binding/introspection.cpp": (
        {"csrc/core", "csrc/cpu/isa.h", "csrc/cpu/traits.h", "csrc/binding/regions.h"},
        {"pybind11/pybind11.h"},
    ),
    "csrc/binding/cuda.cpp": (
        {"csrc/core", "csrc/kernels", "csrc/binding"},
        {"cuda_runtime.h", "torch/csrc/stable/*", "torch/headeronly/*"},
    ),
    "csrc/binding/workspace.h": ({"csrc/core", "csrc/binding"}, {"cuda_runtime.h"}),
    "csrc/binding/*": (
        {"csrc/core", "csrc/cpu/launch.h", "csrc/kernels/launch.h", "csrc/binding"},
        {"torch/csrc/stable/*", "torch/headeronly/*"},
    ),
}


def rule(path: str):
    return next(allowed for pattern, allowed in RULES.items() if fnmatch(path, pattern))


def complaints(path: str, text: str) -> list[str]:
    """The includes of a file that its place in the tree does not allow."""
    folders, headers = rule(path)
    found = []
    for quoted, angled in re.findall(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', text, re.M):
        if quoted:
            target = (ROOT / path).parent.joinpath(quoted).resolve().relative_to(ROOT)
            if not {str(target), str(target.parent)} & folders:
                found.append(quoted)
        elif not re.fullmatch(SYSTEM, angled) and not any(fnmatch(angled, h) for h in headers):
            found.append(angled)
    return found


SOURCES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("csrc/*/*")
    if path.suffix in {".h", ".cuh", ".cu", ".cpp"}
)


@pytest.mark.parametrize("path", SOURCES)
def test_includes_stay_within_the_table(path):
    assert complaints(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/core/plan.h", "#include <cuda_runtime.h>"),
        ("csrc/core/plan.h", '#include "../kernels/launch.h"'),
        ("csrc/kernels/launch.h", "#include <cuda_runtime.h>"),
        ("csrc/kernels/forward.cu", "#include <torch/csrc/stable/tensor.h>"),
        ("csrc/kernels/forward.cu", "#  include <cub/cub.cuh>"),
        ("csrc/kernels/forward.cu", '#include "../binding/checks.h"'),
        ("csrc/cpu/forward.cpp", "#include <ATen/ATen.h>"),
        ("csrc/cpu/forward.cpp", '#include "../kernels/reduce.cuh"'),
        ("csrc/binding/cpu.cpp", "#include <cuda_runtime.h>"),
        ("csrc/binding/cpu.cpp", "#include <pybind11/pybind11.h>"),
        ("csrc/binding/cuda.cpp", "#include <torch/extension.h>"),
        ("csrc/binding/cuda.cpp", "#include <c10/cuda/CUDAStream.h>"),
        ("csrc/binding/introspection.cpp", "#include <torch/csrc/stable/ops.h>"),
    ],
)
def test_the_table_would_notice(path, line):
    assert len(complaints(path, f"#include <vector>\n{line}\n")) == 1


def listed_paths(text: str) -> set[str]:
    """The paths in the ```text block under the heading "The tree".

    A line holds a path, two spaces or more, and free text. A line that is indented belongs to the
    folder, ending in a slash, above it that is indented less. Paths may hold the wildcards of
    fnmatch. A folder with nothing below it in the list stands for all that is in it.
    """
    block = re.search(r"^#+ The tree\n.*?^```text\n(.*?)^```", text, re.M | re.S)
    assert block, 'CONTRIBUTING.md must have a ```text block under a heading "The tree"'
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in filter(str.strip, block[1].splitlines()):
        indent = len(line) - len(line.lstrip())
        name = re.split(r"\s{2,}", line.strip())[0]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else "") + name
        if folders and folders[-1][1] in paths:
            paths.remove(folders[-1][1])  # what is below says it more precisely
        paths.append(path)
        if name.endswith("/"):
            folders.append((indent, path))
    return set(paths)


def differences(listed: set[str], files: set[str]) -> tuple[set[str], set[str]]:
    """Files that no line lists, and lines that list no file."""

    def lists(pattern: str, path: str) -> bool:
        return path.startswith(pattern) if pattern.endswith("/") else fnmatch(path, pattern)

    unlisted = {path for path in files if not any(lists(pattern, path) for pattern in listed)}
    missing = {pattern for pattern in listed if not any(lists(pattern, path) for path in files)}
    return unlisted, missing


def test_the_tree_is_listed():
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no telling which files belong to it")
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    files = {path for path in done.stdout.splitlines() if (ROOT / path).exists()}
    unlisted, missing = differences(listed_paths((ROOT / "CONTRIBUTING.md").read_text()), files)
    assert not unlisted, "not in CONTRIBUTING.md's tree"
    assert not missing, "in CONTRIBUTING.md's tree, but not there"


def test_the_list_would_notice():
    tree = "setup.py  builds\ncsrc/\n  core/  all of it\n  cpu/\n    f*.cpp  x\n"
    readme = f"## The tree\n\n```text\n{tree}```\n"
    listed = listed_paths(readme)
    assert listed == {"setup.py", "csrc/core/", "csrc/cpu/f*.cpp"}
    files = {"setup.py", "csrc/core/a.h", "csrc/core/b.h", "csrc/cpu/forward.cpp"}
    assert differences(listed, files) == (set(), set())
    assert differences(listed, files | {"csrc/cpu/x.cpp"}) == ({"csrc/cpu/x.cpp"}, set())
    assert differences(listed, files - {"setup.py"}) == (set(), {"setup.py"})


def test_linters_are_pinned_alike():
    project = (ROOT / "pyproject.toml").read_text()
    pins = dict(re.findall(r'"(ruff|clang-format)==([\d.]+)"', project))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"rev: v([\d.]+)", hooks) == [pins["ruff"], pins["clang-format"]]
