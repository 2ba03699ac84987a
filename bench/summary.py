"""What a run says in a few lines: ratios to F.batch_norm over all shapes, as a Markdown table.

python -m bench.summary bench/results/cpu/cpu.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from . import OPS, OURS


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


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print("\n".join(lines(json.loads(Path(path).read_text()))))
