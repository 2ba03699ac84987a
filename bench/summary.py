"""What a run says in a few lines, as Markdown tables: ratios to F.batch_norm over all shapes, and
on the CPU the share of a copy's speed that large tensors reach.

    python -m bench.summary bench/results/cpu/zen5-avx512/cpu.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from . import OPS, OURS, PEER

MAPPED_ANEW = 32 << 20  # bytes; glibc maps larger blocks anew each time, unless told otherwise


def _text(ratios: list[float]) -> str:
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{mean:.2f} ({min(ratios):.2f} ... {max(ratios):.2f})"


def rows_of(results: dict) -> list[dict]:
    return [
        row
        for row in results["rows"]
        if row["provider"] == OURS and row.get("ratio") is not None and not row["hot"]
    ]


def lines(results: dict) -> Iterator[str]:
    """A row for each layout, dtype and number of threads: the geometric mean over the shapes, and
    the smallest and the largest."""
    rows = rows_of(results)
    ops = [op for op in OPS if any(row["op"] == op for row in rows)]
    yield "| layout, dtype | threads | " + " | ".join(ops) + " |"
    yield "| --- " * (2 + len(ops)) + "|"
    keys = dict.fromkeys((row["layout"], row["dtype"], row["threads"]) for row in rows)
    for key in sorted(keys, key=str):
        found = {
            op: [
                r["ratio"]
                for r in rows
                if (r["layout"], r["dtype"], r["threads"], r["op"]) == (*key, op)
            ]
            for op in ops
        }
        layout, dtype, threads = key
        cells = " | ".join(_text(ratios) if ratios else "" for ratios in found.values())
        yield f"| {layout.upper()}, {dtype} | {threads or ''} | {cells} |"


def of_large_tensors(results: dict) -> Iterator[str]:
    """A row for each dtype, of tensors beyond 32 MB: the median of the roof over shapes, layouts
    and threads, the smallest and the largest, and the peer's median. Their inputs come out of
    memory, like all that are not hot, even where one of them alone would fit the cache."""
    if results["header"]["device"] != "cpu":
        return
    large = [r for r in results["rows"] if "us" in r and r["tensor_bytes"] > MAPPED_ANEW]
    for dtype in dict.fromkeys(row["dtype"] for row in large):
        cells = []
        for op in ("forward", "backward"):
            ours, theirs = (
                [r["of_roof"] for r in large if (r["provider"], r["op"], r["dtype"]) == key]
                for key in ((OURS, op, dtype), (PEER, op, dtype))
            )
            median, peer = statistics.median(ours), statistics.median(theirs)
            cells.append(f"{median:.2f} ({min(ours):.2f} ... {max(ours):.2f}); {peer:.2f}")
        memory = "kept" if results["header"].get("allocator") else "mapped anew"
        yield f"| {memory}, {dtype} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        results = json.loads(Path(path).read_text())
        print("\n".join([*lines(results), "", *of_large_tensors(results)]))
