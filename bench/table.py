"""The rows as text, as they are measured."""

from __future__ import annotations

HEADER = (
    f"{'op':9} {'shape':16} {'dtype':8} {'layout':6} {'provider':22} "
    f"{'us':>10} {'+-':>5} {'GB/s':>7} {'of roof':>8} {'x peer':>7}"
)


def line(row: dict) -> str:
    provider = row["provider"] + (f" ({row['backend']})" if row["backend"] else "")
    notes = [] if row["threads"] is None else [f"{row['threads']} threads"]
    notes += ["hot"] if row["hot"] else []
    start = f"{row['op']:9} {row['shape']:16} {row['dtype']:8} {row['layout']:6} {provider:22} "
    if "us" not in row:
        return start + f"failed: {row['error']}"
    notes += [f"not a graph: {row['because']}"] if row["because"] else []
    # What fits the cache may well be faster than the memory: no fraction of the memory's speed.
    of_roof = "(cache)" if row["in_cache"] else f"{100 * row['of_roof']:.0f}%"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    figures = f"{row['us']:10.1f} {50 * row['spread']:4.0f}% {row['gb_per_s']:7.1f} {of_roof:>8}"
    return f"{start}{figures} {ratio:>7}  {', '.join(notes)}".rstrip()
