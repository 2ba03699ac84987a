"""The order in which the machine code loads, without a GPU: a block has one way to memory to wait
for before its statistics, and all that it needs for them should be under way at once.

The compiler is free to widen a 16-bit value as soon as it is loaded, and to wait for it, in front
of the loads that follow. A launch, and with channels_last every slab, then begins with a way to
memory for the pivots alone, 0.6 to 0.8 us where a small layer takes 5 in all, and no other test
can notice.
"""

from __future__ import annotations

import pytest
from nvcc import cubin, find_nvcc
from sass import Block, disassembled, find_nvdisasm, path_without_waiting
from test_nvcc import DTYPES, LAYOUTS, variant_of

ARCHITECTURE = "9.0"
KERNELS = ("forward", "backward", "inference")


def tile_of(kernel: str, slot_bytes: int, blocks: list[Block]) -> int:
    """The first block with all loads of a tile but the last, which may have one of its own. They
    are marked as the last reads of their lines (EF: evict first)."""
    tensors = 2 if kernel == "backward" else 1
    loads = tensors * min(128 // tensors // slot_bytes, 16)
    return next(k for k, block in enumerate(blocks) if block.count("LDG.E.EF") >= loads - 1)


@pytest.fixture(scope="module")
def code(request) -> dict[tuple[str, str, int], tuple[list[Block], int]]:
    """The kernel's instantiations, by dtype, layout and slot: their blocks, and which of them
    loads the tile."""
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    if nvcc is None:
        pytest.skip("no CUDA toolkit: neither nvcc nor its headers are here to compile with")
    if nvdisasm is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    found = {}
    for mangled, blocks in disassembled(nvdisasm, cubin(nvcc, request.param, ARCHITECTURE)).items():
        name = variant_of(mangled)
        layout = LAYOUTS[int(name["layout"])]
        slot_bytes = int(name["slot"])
        tile = tile_of(request.param, slot_bytes, blocks)
        found[DTYPES[name["dtype"]], layout, slot_bytes] = blocks, tile
    assert len(found) == 2 * (2 + 3 + 4 + 4) + 3 + 2
    return found


@pytest.mark.parametrize("code", KERNELS, indirect=True)
def test_nothing_is_waited_for_before_the_tile_is_on_its_way(code):
    for which, (blocks, tile) in code.items():
        length = path_without_waiting(blocks, tile)
        print(which, f"{length} instructions until the tile is on its way")
        assert length is not None, f"{which}: the tile's loads stand behind a wait for others"


@pytest.mark.parametrize("code", ["forward"], indirect=True)
def test_the_limits_of_the_step_are_computed_beside_the_tile(code):
    """In double, from the counter and the schedule, which one thread waits for; with it a warp."""
    for which, (blocks, tile) in code.items():
        divisions = sum(block.count("MUFU.RCP64H") for block in blocks[:tile])
        assert divisions == 0 and any(block.count("MUFU.RCP64H") for block in blocks), which


@pytest.mark.parametrize(
    ("code", "layout", "most"),
    [
        # It takes up to 12, 7, 8 and 6.
        ("forward", "channels_first", 14),
        ("forward", "channels_last", 9),
        ("backward", "channels_first", 10),
        ("backward", "channels_last", 8),
        ("forward", "bundles", 9),
        ("backward", "bundles", 8),
        ("forward", "unaligned", 16),
        ("backward", "unaligned", 12),
    ],
    indirect=["code"],
)
def test_an_address_is_a_step_from_the_last_one(code, layout, most):
    """Computed anew for every slot, with 64-bit products, it takes 18 instructions a load in the
    forward pass; of two-byte slots an H200 has time for 31 in all, if it is to run at the speed of
    a copy (132 SMs x 128 lanes x 1.98 GHz over the 4.3 TB/s of a copy, 4 bytes)."""
    for which, (blocks, tile) in code.items():
        if which[1] != layout:
            continue
        cost = len(blocks[tile].instructions) / blocks[tile].count("LDG.")
        print(which, f"{cost:.1f} instructions a load")
        assert cost <= most, which


@pytest.mark.parametrize("code", ["forward", "backward"], indirect=True)
def test_nothing_is_asked_for_in_the_l1_that_the_barrier_empties(code):
    """An acquire is a load and an invalidation of all the L1: what was asked for there before is
    gone when the barrier opens."""
    for which, (blocks, _) in code.items():
        counts = {op: sum(b.count(op) for b in blocks) for op in ("CCTL.IVALL", "CCTL.E.PF")}
        asked = sum(b.count("CCTL.E.PF2") for b in blocks)
        print(which, counts, asked)
        assert counts["CCTL.IVALL"] > 0 and counts["CCTL.E.PF"] == asked, which
        assert asked > 0 or which[2] == 2, f"{which}: slots that are copied ahead, but no state"
