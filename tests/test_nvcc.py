"""nvcc's own verdict on the shipped kernels, for every architecture and without a GPU: no warnings,
nothing spilled from registers to memory, and as many blocks an SM as the planner counts on. And on
the programs under bench/: no warnings.

BATCHRENORM_NVCC_ARCHITECTURES="7.5;9.0" takes fewer.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from nvcc import STRICT, cubin, find_nvcc, made
from simt import build

from batchrenorm_cuda import _C

KERNELS = ("forward", "backward", "inference", "moments", "backward_sums", "backward_project")
KERNELS += ("merge",)
# Whose plans they follow.
PREFETCHING = {"forward": "forward", "moments": "forward"}
PREFETCHING |= {"backward": "backward", "backward_sums": "backward"}

# Shared memory of an SM in bytes, of which each resident block takes 1 KB for the system from sm_80
# on.
SHARED_MEMORY = {
    "7.5": 64 << 10,
    "8.0": 164 << 10,
    "8.6": 100 << 10,
    "8.9": 100 << 10,
    "9.0": 228 << 10,
    "10.0": 228 << 10,
    "12.0": 100 << 10,
}
REGISTERS = 65536  # of an SM, all architectures
THREADS = 256  # of a block, at most: kMaxThreads


def architectures() -> list[str]:
    return os.environ.get("BATCHRENORM_NVCC_ARCHITECTURES", ";".join(SHARED_MEMORY)).split(";")


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one instantiation."""

    kernel: str
    dtype: str
    layout: str
    slot_bytes: int
    registers: int
    shared: int
    stack: int
    spilled: int

    @property
    def blocks_per_sm(self) -> int:
        """csrc/core/geometry.h: blocks_per_sm. merge is one block in all."""
        if self.kernel == "merge" or self.dtype == "float64":
            return 1
        return 3 if self.layout in ("channels_first", "unaligned") else 2


_ENTRY = re.compile(r"Compiling entry function '(\S+)'")
_NAME = re.compile(
    r"(?P<kernel>[a-z_]+)_kernelI(?P<dtype>d|f|6__half|13__nv_bfloat16)"
    r"(LN\w*?6LayoutE(?P<layout>[0123])ELi(?P<slot>\d+))?E"
)
LAYOUTS = ("channels_first", "channels_last", "bundles", "unaligned")
DTYPES = {"d": "float64", "f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def variant_of(mangled: str) -> re.Match:
    """The parts of a kernel's name."""
    name = _NAME.search(re.sub(r"^.*?\d+(?=[a-z_]+_kernelI)", "", mangled))
    assert name is not None, f"a kernel that this test does not know: {mangled}"
    return name


def parse(log: str) -> list[Resources]:
    found = []
    for section in re.split(r"(?=ptxas info\s+: Compiling entry)", log)[1:]:
        entry = _ENTRY.search(section)[1]
        name = variant_of(entry)
        frame, shared = _FRAME.search(section), _SHARED.search(section)
        found.append(
            Resources(
                kernel=name["kernel"],
                dtype=DTYPES[name["dtype"]],
                layout=LAYOUTS[int(name["layout"] or 0)],
                slot_bytes=int(name["slot"] or 0),
                registers=int(_REGISTERS.search(section)[1]),
                shared=int(shared[1]) if shared else 0,
                stack=int(frame[1]),
                spilled=int(frame[2]) + int(frame[3]),
            )
        )
    return found


@pytest.fixture(scope="module")
def nvcc() -> Path:
    found = find_nvcc()
    if found is None:
        pytest.skip("no CUDA toolkit: neither nvcc nor its headers are here to compile with")
    return found


# Architectures of one kernel in a row: they have PTX in common.
@pytest.mark.parametrize("architecture", architectures())
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_fits_its_registers(nvcc: Path, kernel: str, architecture: str):
    found = parse(cubin(nvcc, kernel, architecture).with_suffix(".log").read_text())
    # Two layouts times the slot widths: 2 of double, 3 of float, 4 each of half and bfloat16.
    # Bundles have one width, and are not of double; unaligned planes one, of half and bfloat16.
    expected = 2 if kernel == "merge" else 2 * (2 + 3 + 4 + 4) + 3 + 2
    assert len(found) == expected and {r.kernel for r in found} == {kernel}
    for r in found:
        where = f"{architecture} {r.kernel} {r.dtype} {r.layout} {r.slot_bytes}"
        print(f"{where}: {r.registers} registers, {r.shared} bytes")
    spilling = [r for r in found if r.spilled or r.stack]
    assert not spilling, f"spilled to local memory: {spilling}"
    for r in found:
        # Registers are handed out to a warp in units of 256, 8 a lane.
        registers = -(-r.registers // 8) * 8 * THREADS
        # Two-byte loads need a block more than the planner counts on.
        blocks = r.blocks_per_sm + ((kernel, r.slot_bytes) == ("forward", 2))
        assert blocks * registers <= REGISTERS, f"fewer blocks an SM than wanted: {r}"
        assert r.blocks_per_sm * (r.shared + 1024) <= SHARED_MEMORY[architecture], (
            f"too much shared memory: {r}"
        )
        assert r.shared <= 48 << 10
        if kernel not in PREFETCHING:
            continue
        # With what a prefetch needs there are as many blocks, and the planner knows it; what it
        # retains is what it then sees left.
        odd = {"bundles": (256, 2048, 49), "unaligned": (256, 256, 361)}
        keywords = {"dtype": r.dtype, "alignment": r.slot_bytes}
        keywords["layout"] = "channels_first" if r.layout in odd else r.layout
        plan = _C.plan(PREFETCHING[kernel], *odd.get(r.layout, (2, 256, 256)), **keywords)
        assert plan.slot_bytes == r.slot_bytes
        assert r.layout not in odd or getattr(plan, r.layout)
        assert r.shared + 16 <= plan.shared_bytes - plan.dynamic_shared_bytes
        block = -(-(r.shared + 16 + _C.PREFETCH_BYTES + 1024) // 128) * 128
        assert architecture == "7.5" or r.blocks_per_sm * block <= SHARED_MEMORY[architecture]


def bench_programs() -> dict[str, tuple[str, ...]]:
    """What bench/gpu.sh compiles, and with which flags."""
    script = (build.REPOSITORY / "bench/gpu.sh").read_text().replace("\\\n", " ")
    found = re.findall(r"\bnvcc (-.*) -arch=native bench/(\w+)\.cu ", script)
    return {name: tuple(flags.split()) for flags, name in found}


def test_the_gpu_script_compiles_every_program():
    programs = {path.stem for path in build.REPOSITORY.glob("bench/*.cu")}
    assert programs and bench_programs().keys() == programs


@pytest.mark.parametrize("program", bench_programs())
def test_a_program_of_the_benchmark_compiles(nvcc: Path, program: str):
    """All of it, the host's part too; sweep's kernels are compiled above, and not linked here."""
    source = build.REPOSITORY / f"bench/{program}.cu"
    made(nvcc, source, ".o", *bench_programs()[program], "-c", "-arch=sm_90", *STRICT)
