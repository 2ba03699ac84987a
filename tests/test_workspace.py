"""Who shares control words with whom, without a GPU: csrc/binding/workspace.h over a fake CUDA."""

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
    ("right", "wrong"),
    [
        ("key{status == cudaStreamCaptureStatusActive, capture, id}", "key{false, 0, id}"),
        ("key{status == cudaStreamCaptureStatusActive, capture, id}", "key{false, capture, 0}"),
        ("const RelaxedCapture relaxed;", ""),
        ("if (error == cudaSuccess) error = cudaStreamSynchronize(stream);", ""),
        ("next_ += words(sm_count);", "next_ += words(sm_count) / 2;"),
    ],
    ids=["captures share", "streams share", "strict capture", "not waited for", "slots overlap"],
)
def test_the_test_would_notice(tmp_path, right, wrong):
    broken = tmp_path / "csrc/binding"
    broken.mkdir(parents=True)
    (tmp_path / "csrc/core").symlink_to(ROOT / "csrc/core")
    text = (ROOT / "csrc/binding/workspace.h").read_text()
    assert right in text
    (broken / "workspace.h").write_text(text.replace(right, wrong))
    (broken / "require.h").symlink_to(ROOT / "csrc/binding/require.h")
    done = run(broken, tmp_path)
    assert done.returncode != 0
