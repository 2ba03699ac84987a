"""setup.py: what it decides, what it says when it cannot, and that it does no work twice."""

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from batchrenorm_cuda import _C, __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, in an environment that asks for nothing."""
    for name in ("BATCHRENORM_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(path: Path, prints: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nprintf '{prints}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def toolkit(root: Path, version: str, headers: bool = True) -> Path:
    command(root / "bin/nvcc", rf"release {version}, V{version}.48\n")
    if headers:
        (root / "include").mkdir(parents=True)
        (root / "include/cuda_runtime_api.h").touch()
    return root


def test_setup_py_stays_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150


def test_sources_are_those_in_the_tree(setup_py):
    listed = [*setup_py.BINDING, *setup_py.CPU, *setup_py.CUDA, "csrc/binding/no_cuda.cpp"]
    there = [*ROOT.glob("csrc/*/*.cpp"), *ROOT.glob("csrc/*/*.cu")]
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in there)


def test_it_finds_the_installed_torch_without_importing_it(setup_py):
    root, version, cuda = setup_py.find_torch()
    assert (version, cuda) == (torch.__version__, torch.version.cuda)
    assert root == Path(torch.__file__).parent


@pytest.mark.parametrize("version", [None, "2.10.1"])
def test_no_torch_or_an_old_one_is_one_message(setup_py, monkeypatch, tmp_path, version):
    spec = None
    if version:
        (tmp_path / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
        spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
    monkeypatch.setattr(setup_py, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit, match=f"2.11 or newer.* found {version or 'none'}") as stopped:
        setup_py.find_torch()
    assert "pip install -U torch ninja" in str(stopped.value)


def test_no_ninja_is_one_message(setup_py, monkeypatch, tmp_path):
    found = setup_py.find_spec
    monkeypatch.setattr(setup_py, "find_spec", lambda n: None if n == "ninja" else found(n))
    monkeypatch.setenv("BATCHRENORM_CUDA", "0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="needs ninja to build. Run\n  pip install ninja"):
        setup_py.Build(Distribution()).build_extension(setup_py.Extension("_C", []))


def test_another_system_is_one_message(setup_py, monkeypatch):
    monkeypatch.setenv("BATCHRENORM_CUDA", "0")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="needs Linux, macOS or, on Windows, WSL 2"):
        setup_py.Build(Distribution()).build_extension(setup_py.Extension("_C", []))


@pytest.mark.parametrize("target", ["aarch64-macos", "aarch64-linux-gnu"])
def test_the_cpu_sources_compile_elsewhere(setup_py, target, tmp_path):
    """With clang, and with vectors of NEON. `pip install ziglang` brings what that takes."""
    pytest.importorskip("ziglang")
    include = Path(torch.__file__).parent / "include"
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17", "-O1"]
    command += ["-W", "-Wall", "-Werror", setup_py.STABLE_ABI, f"-isystem{include}", "-c"]
    for source in [*setup_py.CPU, "csrc/binding/cpu.cpp", "csrc/binding/schema.cpp"]:
        done = subprocess.run(
            [*command, source, "-o", str(tmp_path / "object.o")],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{source}\n{done.stderr}"


def test_without_cuda_on_request(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "13.0")))
    monkeypatch.setenv("BATCHRENORM_CUDA", "0")
    assert setup_py.choose_toolkit("2.13.0", "13.0") == (None, "", "BATCHRENORM_CUDA=0")


def test_a_cpu_only_torch_takes_any_toolkit(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "12.9")))
    root, version, why = setup_py.choose_toolkit("2.13.0+cpu", None)
    assert (root, version) == (tmp_path, "12.9")
    assert str(tmp_path) in why


def test_nvcc_without_headers_beside_it_is_passed_over(setup_py, monkeypatch, tmp_path):
    """On PATH there may be a wrapper script alone; headers elsewhere belong to another version."""
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "wrapper", "12.1", headers=False)))
    monkeypatch.setenv("CUDA_PATH", str(toolkit(tmp_path / "real", "12.9")))
    assert next(setup_py.find_toolkits()) == (tmp_path / "real", "12.9")


def test_nvcc_on_path_is_followed_to_its_root(setup_py, monkeypatch, tmp_path):
    toolkit(tmp_path / "cuda-12.9", "12.9")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").symlink_to(tmp_path / "cuda-12.9/bin/nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert next(setup_py.find_toolkits()) == (tmp_path / "cuda-12.9", "12.9")


def test_pip_packages_are_a_toolkit(setup_py, monkeypatch, tmp_path):
    root = toolkit(tmp_path / "nvidia/cu13", "13.0")
    spec = importlib.util.spec_from_loader("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "nvidia")]
    monkeypatch.setattr(setup_py, "find_spec", lambda name: spec)
    assert (root, "13.0") in list(setup_py.find_toolkits())


def test_no_toolkit_is_a_complete_build_unless_one_was_asked_for(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "find_toolkits", lambda: [])
    root, _, why = setup_py.choose_toolkit("2.13.0+cpu", None)
    assert root is None
    assert "no CUDA toolkit found" in why
    monkeypatch.setenv("BATCHRENORM_CUDA", "1")
    with pytest.raises(SystemExit, match="CUDA_HOME"):
        setup_py.choose_toolkit("2.13.0+cpu", None)


def test_a_toolkit_of_torch_s_cuda_major_is_preferred(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "12", "12.9")))
    monkeypatch.setenv("CUDA_PATH", str(toolkit(tmp_path / "13", "13.1")))
    assert setup_py.choose_toolkit("2.13.0+cu130", "13.0")[:2] == (tmp_path / "13", "13.1")


def test_a_toolkit_of_another_major_says_what_to_run(setup_py, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_py, "find_toolkits", lambda: [(Path("/opt/cuda"), "12.9")])
    with pytest.raises(SystemExit) as stopped:
        setup_py.choose_toolkit("2.13.0+cu130", "13.0")
    message = str(stopped.value)
    assert "torch 2.13.0+cu130 is for CUDA 13.0, /opt/cuda is 12.9" in message
    assert "a torch for CUDA 12.9" in message
    assert "BATCHRENORM_CUDA=0" in message
    assert "a toolkit 13.x" in message


def test_architectures_as_listed(setup_py, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;12.0+PTX")
    assert setup_py.choose_architectures(Path("nvcc"))[0] == ["8.0", "9.0a", "12.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(SystemExit, match="got 'Ampere'"):
        setup_py.choose_architectures(Path("nvcc"))


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        ("", ["7.5", "8.0", "8.6", "8.9", "9.0"]),  # no driver: all that this nvcc knows
        ("9.0\n9.0\n8.6\n", ["8.6", "9.0"]),
        ("12.0\n", ["9.0+PTX"]),  # a chip that this nvcc does not know: it compiles for it itself
    ],
    ids=["no GPU", "two kinds of GPU", "a GPU newer than nvcc"],
)
def test_architectures_as_seen(setup_py, monkeypatch, tmp_path, visible, chosen):
    known = "".join(rf"compute_{n}\n" for n in (75, 80, 86, 89, 90))
    nvcc = command(tmp_path / "nvcc", known)
    if visible:
        command(tmp_path / "nvidia-smi", visible.replace("\n", r"\n"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert setup_py.choose_architectures(nvcc)[0] == chosen


def test_gencode(setup_py):
    """nvcc makes PTX once for each arch= that it is given, and machine code of it."""
    of = {arch: setup_py.gencode(arch) for arch in (*setup_py.ARCHES, "8.7+PTX", "9.0a")}
    assert of["7.5"] == "'-gencode=arch=compute_75,code=[sm_75]'"
    assert of["9.0"] == "'-gencode=arch=compute_80,code=[sm_90]'"
    assert of["9.0a"] == "'-gencode=arch=compute_90a,code=[sm_90a]'"
    assert of["8.7+PTX"] == "'-gencode=arch=compute_87,code=[sm_87,compute_87]'"
    assert of["10.0+PTX"] == "'-gencode=arch=compute_100,code=[sm_100,compute_100]'"
    assert of["12.0"] == "'-gencode=arch=compute_100,code=[sm_120]'"


def test_architectures_with_ptx_in_common_compile_the_same_source(setup_py):
    """A branch for 9.0 alone would be left out of what is made for it from the PTX of 8.0."""
    sources = "".join(path.read_text() for path in ROOT.glob("csrc/*/*"))
    least = [int(n) for n in re.findall(r"__CUDA_ARCH__ (?:<|>=) (\d+)", sources)]
    assert len(least) == len(re.findall(r"(?<!defined\()__CUDA_ARCH__", sources)) > 0
    for name, virtual in setup_py.ARCHES.items():
        own = int(name.partition("+")[0].replace(".", ""))
        assert [10 * own >= n for n in least] == [10 * virtual >= n for n in least], name


def test_build_info_is_about_this_build():
    info = _C.build_info()
    assert info["version"] == __version__
    assert info["torch"].split(".")[0] == "2"
    assert info["cuda"] == bool(info["nvcc"]) == bool(info["architectures"])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is needed to build, built once without CUDA. It is named as a clone is."""
    copy = tmp_path_factory.mktemp("checkout") / "batchrenorm_cuda"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "batchrenorm_cuda"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    assert "CPU kernels (BATCHRENORM_CUDA=0)" in build(copy)
    return copy


def build(checkout: Path) -> str:
    arguments = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "BATCHRENORM_CUDA": "0", "CXXFLAGS": "-O0"}
    done = subprocess.run(
        arguments, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_second_build_compiles_nothing(checkout):
    assert "no work to do" in build(checkout)


def test_a_build_takes_the_place_of_another(checkout, tmp_path):
    """Of a newer one, too, as when CUDA is left out again; and a process keeps what it has."""
    (target,) = (checkout / "batchrenorm_cuda").glob("_C.*.so")
    built = target.read_bytes()
    target.unlink()
    target.write_bytes(b"another")
    os.link(target, tmp_path / "mapped")
    build(checkout)
    assert target.read_bytes() == built
    assert (tmp_path / "mapped").read_bytes() == b"another"


def test_a_changed_header_compiles_what_includes_it(checkout):
    (checkout / "csrc/binding/checks.h").touch()
    compiled = [line for line in build(checkout).splitlines() if line.startswith("[")]
    assert {line.split("/")[-1] for line in compiled} == {"cpu.cpp", "no_cuda.cpp", "_C.so"}


def test_an_installed_package_is_complete(checkout, tmp_path):
    """From a wheel, in another folder: the compiled part, the stubs and every module are there."""
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--target", str(target), str(checkout)]
    environment = {**os.environ, "BATCHRENORM_CUDA": "0", "CXXFLAGS": "-O0"}
    done = subprocess.run(pip, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    for source in (ROOT / "batchrenorm_cuda").rglob("*.py*"):
        if source.suffix != ".pyc":
            assert (target / source.relative_to(ROOT)).exists()
    assert (target / "batchrenorm_cuda/py.typed").exists()

    doctor = [sys.executable, "-m", "batchrenorm_cuda", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        doctor, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in {target}" in done.stdout


def test_an_editable_install_is_found_beside_the_clone(checkout, tmp_path):
    """There the clone itself, which has the name of the package, looks like a namespace package.

    The wheel is what pip would unpack into site-packages, and -S hides the site-packages that are
    in use, which have an install of their own.
    """
    next(checkout.glob("batchrenorm_cuda/_C.*.so")).unlink()
    hook = f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"
    environment = {**os.environ, "BATCHRENORM_CUDA": "0", "CXXFLAGS": "-O0"}
    done = subprocess.run(
        [sys.executable, "-c", hook],
        cwd=checkout, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(checkout.glob("batchrenorm_cuda/_C.*.so")), "an editable install builds in place"
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")

    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
    code += "from importlib.util import find_spec; print(find_spec('batchrenorm_cuda').origin)"
    for folder in (checkout.parent, tmp_path):
        found = subprocess.run(
            [sys.executable, "-E", "-S", "-c", code],
            cwd=folder, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert found.strip() == str(checkout / "batchrenorm_cuda/__init__.py")


def test_a_source_distribution_is_complete(tmp_path):
    """What the Makefile and the tests read is in it: all but the results of benchmarks, of two
    megabytes, and what is for the repository alone."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no telling which files belong to it")
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    files = {path for path in done.stdout.splitlines() if (ROOT / path).exists()}
    listing = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
    (sources,) = tmp_path.glob("*.egg-info/SOURCES.txt")
    shipped = {os.path.normpath(path) for path in sources.read_text().splitlines()}
    left_out = ("bench/results/", ".ci/", ".gitignore")
    assert {path for path in files - shipped if not path.startswith(left_out)} == set()
    assert not [path for path in shipped if path.startswith(left_out)]


def test_a_source_tree_that_is_not_built_says_so(tmp_path):
    """As after pip install . in a clone: there Python finds the sources first."""
    shutil.copytree(
        ROOT / "batchrenorm_cuda",
        tmp_path / "batchrenorm_cuda",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    (tmp_path / "setup.py").touch()
    # Without the finder that an editable install may have, which would find the compiled part.
    others = "[f for f in sys.meta_path if 'editable' not in repr(f).lower()]"
    code = f"import sys; sys.meta_path = {others}; import batchrenorm_cuda"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"its source tree, {tmp_path}, where it has not been built" in done.stderr


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="needs a build with CUDA kernels")
def test_kernels_are_compiled_again_when_a_header_changes():
    """nvcc's dependencies are known to ninja."""
    info = _C.build_info()
    folder = f"build/{sys.implementation.cache_tag}-torch-{info['torch']}-{info['nvcc']}"
    if not (ROOT / folder / "build.ninja").exists():
        pytest.skip("was not built in this checkout")
    ninja = [sys.executable, "-m", "ninja", "-f", f"{folder}/build.ninja", "-t", "deps"]
    listed = subprocess.run(
        [*ninja, f"{folder}/csrc/kernels/forward.cu.o"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "csrc/core/math.h" in listed
    assert "csrc/kernels/reduce.cuh" in listed
