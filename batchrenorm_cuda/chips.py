"""GPUs as the planner sees them, for plans on a machine without one."""

from __future__ import annotations

from typing import NamedTuple

_SHARED_KB = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}


class Chip(NamedTuple):
    """What a plan and the expectation of it depend on."""

    sm_count: int
    bandwidth: float  # of the memory, GB/s
    l2: float  # bytes
    capability: int  # 10 * major + minor

    @property
    def shared(self) -> int:
        """Bytes of shared memory of an SM, as the CUDA programming guide lists them."""
        return _SHARED_KB[self.capability] << 10

    @property
    def copy(self) -> float:
        """What a copy reaches in GB/s, bytes read and bytes written counted.

        0.9 of the data sheet: on an H200, 4.3 of 4.8 TB/s.
        """
        return 0.9 * self.bandwidth


# The largest version of each, as NVIDIA's data sheets and architecture white papers (Turing, GA100,
# GA102, Ada, Hopper, Blackwell) give it: SMs = CUDA cores / 128, or / 64 on T4, A100. The L2 of
# H100, H200 and B200 is what the driver reports.
CHIPS = {
    "t4": Chip(40, 320, 4e6, 75),
    "a100": Chip(108, 2039, 40e6, 80),
    "a10": Chip(72, 600, 6e6, 86),
    "rtx3090": Chip(82, 936, 6e6, 86),
    "l4": Chip(58, 300, 48e6, 89),
    "l40s": Chip(142, 864, 96e6, 89),
    "rtx4090": Chip(128, 1008, 72e6, 89),
    "h100": Chip(132, 3350, 50e6, 90),
    "h200": Chip(132, 4800, 60e6, 90),
    "b200": Chip(148, 8000, 126e6, 100),
    "rtx5090": Chip(170, 1792, 96e6, 120),
}


# Several times what any chip has, and fewer than the 3090, 4090 and 5090 in chips' names.
_MOST_SMS = 1024


def find(device_like: str) -> Chip:
    """A chip of `CHIPS` by its name, or an H200 cut to a number of SMs.

    Raises:
        ValueError: for anything else, with the names that contain it.
    """
    if device_like in CHIPS:
        return CHIPS[device_like]
    if device_like.isdecimal() and 0 < int(device_like) <= _MOST_SMS:
        h200 = CHIPS["h200"]
        part = int(device_like) / h200.sm_count
        return Chip(int(device_like), h200.bandwidth * part, h200.l2 * part, h200.capability)
    meant = [name for name in CHIPS if device_like and device_like in name]
    raise ValueError(
        f"device_like must be a number of SMs up to {_MOST_SMS} or one of {', '.join(CHIPS)}, got "
        f"{device_like!r}" + (f": is it {' or '.join(meant)}?" if meant else "")
    )
