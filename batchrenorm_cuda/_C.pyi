"""What Python may ask about the build and about a launch.

Importing it registers torch.ops.batchrenorm.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    torch: str  # it was built against
    compiler: str
    cuda: bool
    nvcc: str  # "" without CUDA
    architectures: list[str]  # "9.0", "12.0+PTX"

class CpuInfo(TypedDict):
    instructions: str  # baseline, avx2 or avx512
    settings: str  # of which processor; see csrc/cpu/traits.h
    known_settings: list[str]

def build_info() -> BuildInfo: ...
def cpu_info() -> CpuInfo: ...

class Plan:
    """How one pass is cut into blocks; csrc/core/geometry.h explains the fields."""

    slot_bytes: int
    columns: int
    slots: int
    threads: int
    team: int
    teams: int
    rounds: int
    retained: int
    prefetch: int
    share: int
    slabs: int

    blocks: int
    waves: int
    positions_per_pass: int
    positions_per_round: int
    bundles: bool  # planes of neighbouring channels side by side
    unaligned: bool  # slots that reach over the ends of a plane
    lanes: int
    slab_channels: int
    positions: int
    control_words: int
    partials_bytes: int
    shared_bytes: int  # of a block, at most
    dynamic_shared_bytes: int  # of them, for what is prefetched or retained
    proposals_bytes: int

    sm_count: int
    resident_blocks: int
    bytes_moved: int  # every tensor of the problem once
    bytes_reread: int  # that were not kept, from L2 or memory
    bytes_in_flight: int  # of them, at a time
    bytes_missed: int  # of them, that L2 no longer holds
    merging: float  # us a slab, of what the team has published
    microseconds: float

    def retains(self, round: int) -> bool: ...

def plan(
    pass_: str,  # "forward", "backward" or "inference"
    batch: int,
    channels: int,
    spatial: int,
    *,
    layout: str = "channels_first",  # or "channels_last"
    dtype: str = "float32",  # "float16", "bfloat16", "float64"
    sm_count: int = 132,
    alignment: int = 16,
    l2_bytes: float = 60e6,
    shared_bytes: int = 233472,  # of an SM
    capability: int = 90,  # 10 * major + minor
) -> Plan: ...

# Of the calling thread, as the operators see it: csrc/binding/regions.h.
def may_repeat() -> bool: ...
def under_saved_tensor_hooks() -> bool: ...
def trust_saved_tensor_hooks(legible: bool) -> None: ...

MAX_THREADS: int
MIN_THREADS: int
MAX_SLAB_CHANNELS: int
PREFETCH_BYTES: int
LINE_WORDS: int
STAT_ROWS: int
