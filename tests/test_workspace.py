"""Who shares control words with whom and which plans are found again, without a GPU:
csrc/binding/workspace.h and plans.h over a fake CUDA.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-g1"]


def run(binding: Path, folder: Path) -> subprocess.CompletedProcess:
    source = (ROOT / "tests/workspace/main.cpp").read_text()
    (folder / "main.cpp").write_text(source.replace("../../csrc/binding", str(binding)))
    compile_ = [CXX, *FLAGS, f"-I{ROOT / 'tests/workspace'}", str(folder / "main.cpp")]
    subprocess.run([*compile_, "-o", str(folder / "main")], check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # slots are never given back
    return subprocess.run(
        [folder / "main"], env=environment, capture_output=True, text=True, check=False
    )


def test_control_words(tmp_path):
    done = run(ROOT / "csrc/binding", tmp_path)
    assert done.stdout == "ok\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("workspace.h", "key{capturing, capture, id}", "key{false, 0, id}"),
        ("workspace.h", "key{capturing, capture, id}", "key{false, capture, 0}"),
        ("workspace.h", "if (capturing) {", "if (false) {"),
        ("workspace.h", "const RelaxedCapture relaxed;", ""),
        (
            "workspace.h",
            "if (error == cudaSuccess) error = cudaStreamSynchronize(stream);",
            "",
        ),
        ("workspace.h", "next_ += words(sm_count);", "next_ += words(sm_count) / 2;"),
        ("plans.h", "!(known.problem == p)", "known.problem.batch != p.batch"),
        ("plans.h", "known = {true, p, ", "known = {false, p, "),
    ],
    ids=[
        "captures share", "streams share", "id of a capturing stream", "strict capture",
        "not waited for", "slots overlap",
        "plans of others", "plans forgotten",
    ],
)  # fmt: skip
def test_the_test_would_notice(tmp_path, file, right, wrong):
    broken = tmp_path / "csrc/binding"
    broken.mkdir(parents=True)
    (tmp_path / "csrc/core").symlink_to(ROOT / "csrc/core")
    for name in ("workspace.h", "plans.h", "require.h"):
        text = (ROOT / "csrc/binding" / name).read_text()
        if name == file:
            assert right in text
            text = text.replace(right, wrong)
        (broken / name).write_text(text)
    done = run(broken, tmp_path)
    assert done.returncode != 0
