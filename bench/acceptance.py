"""The figures that this project promises, and whether one run's results hold them.

    python -m bench.acceptance bench/results/<chip>/resnet50.json

Every promise is a function of the results (as bench.run writes them to JSON) that returns what it
found, or None where the run did not measure it. Nothing here estimates."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import OPS, OURS, PEER

LARGE = 25_000_000  # bytes of one tensor from which the caches no longer help


@dataclass(frozen=True)
class Promise:
    measure: str
    wanted: float
    found: Callable[[dict], float | None]
    at_most: bool = False  # wanted is the largest that holds, not the smallest

    def holds(self, results: dict) -> tuple[str, float | None]:
        found = self.found(results)
        if found is None:
            return "not measured", None
        right = found <= self.wanted if self.at_most else found >= self.wanted
        so_far = " so far" if results.get("stopped_before") else ""
        return f"holds{so_far}" if right else "does not hold", found


def _rows(results: dict, provider: str = OURS, **wanted) -> list[dict]:
    """Rows of one provider in which every named field has (one of) the given value(s); not those
    that have the host in their figure."""

    def fits(row: dict) -> bool:
        return all(
            row[key] in value if isinstance(value, (tuple, list, set)) else row[key] == value
            for key, value in wanted.items()
        )

    return [
        r
        for r in results["rows"]
        if r["provider"] == provider and "us" in r and r["method"] != "events" and fits(r)
    ]


def _least(values: Iterable[float | None]) -> float | None:
    return min((v for v in values if v is not None), default=None)


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(v) for v in values if v is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _large(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["tensor_bytes"] >= LARGE]


def least_of_roof(**wanted) -> Callable[[dict], float | None]:
    return lambda results: _least(r["of_roof"] for r in _large(_rows(results, hot=False, **wanted)))


def sum_of_roof(**wanted) -> Callable[[dict], float | None]:
    """The time at the roof over the time taken, summed over shapes."""

    def found(results: dict) -> float | None:
        rows = _rows(results, hot=False, **wanted)
        taken = sum(row["us"] for row in rows)
        return sum(row["us"] * row["of_roof"] for row in rows) / taken if rows else None

    return found


def mean_ratio(**wanted) -> Callable[[dict], float | None]:
    return lambda results: _geometric_mean(r["ratio"] for r in _rows(results, **wanted))


def least_ratio(**wanted) -> Callable[[dict], float | None]:
    return lambda results: _least(r["ratio"] for r in _rows(results, hot=False, **wanted))


def least_ratio_beyond_noise(**wanted) -> Callable[[dict], float | None]:
    """As least_ratio, granting each shape the spread of both of its measurements."""

    def found(results: dict) -> float | None:
        peers = {_key(row): row for row in _rows(results, PEER, hot=False, **wanted)}
        granted = []
        for row in _rows(results, hot=False, **wanted):
            if peer := peers.get(_key(row)):
                granted.append(row["ratio"] * (1 + row["spread"] / 2 + peer["spread"] / 2))
        return _least(granted)

    return found


def _key(row: dict) -> tuple:
    return tuple(row[k] for k in ("shape", "dtype", "layout", "op", "hot", "threads"))


def overhead(results: dict) -> float | None:
    """The largest of ours over theirs."""
    ratios = [ours / theirs for ours, theirs in (row["us"].values() for row in results["overhead"])]
    return max(ratios, default=None)


def peak_memory(results: dict) -> float | None:
    peaks = [row["peak"] for row in results["memory"]]
    return max((a / b for a, b in zip(peaks[::2], peaks[1::2], strict=True)), default=None)


def launches(results: dict) -> float | None:
    """The most of any pass. None at all, of a pass that ran, is a profiler that may not look."""
    counts = [len(names) for row in results["launches"] for names in row["ran"]]
    return max(counts) if all(counts) and counts else None


def dram_excess(results: dict) -> float | None:
    """The largest distance of the bytes that ncu counted from the floor, as a part of it."""
    return max(
        (abs(row["dram_bytes"] / row["floor_bytes"] - 1) for row in results["dram"]), default=None
    )


HALF_AND_SINGLE = ("float32", "float16", "bfloat16")


def on_cuda() -> list[Promise]:
    promises = []
    for dtype in HALF_AND_SINGLE:
        for op in ("forward", "backward"):
            chosen = {"dtype": dtype, "layout": "nchw", "op": op}
            promises.append(
                Promise(
                    f"NCHW {op}, {dtype}, 25 MB and more: of the roof",
                    0.80,
                    least_of_roof(**chosen),
                )
            )
            promises.append(
                Promise(
                    f"NCHW {op}, {dtype}, sum of resnet50-large: of the roof",
                    0.88,
                    sum_of_roof(suite="resnet50-large", **chosen),
                )
            )
    for layout, ratios in {"nchw": (1.8, 1.8, 6.0), "nhwc": (1.3, 1.3, 1.8)}.items():
        for dtype, ratio in zip(HALF_AND_SINGLE, ratios, strict=True):
            promises.append(
                Promise(
                    f"{layout.upper()} train, {dtype}, resnet50: x F.batch_norm, mean",
                    ratio,
                    mean_ratio(suite="resnet50", op="train", layout=layout, dtype=dtype, hot=False),
                )
            )
    rl = {"suite": "rl", "op": "train", "dtype": "float32", "hot": True}
    return [
        *promises,
        *(Promise(f"any shape, {op}: x F.batch_norm", 0.95, least_ratio(op=op)) for op in OPS),
        Promise(
            "rl, float32, train, graph replay: x F.batch_norm",
            1.6,
            lambda results: _least(row["ratio"] for row in _rows(results, **rl)),
        ),
        Promise("inference, 25 MB and more: of the roof", 0.92, least_of_roof(op="inference")),
        Promise("DRAM bytes: distance from the floor", 0.08, dram_excess, at_most=True),
        Promise("host overhead: of nn.BatchNorm's", 1.0, overhead, at_most=True),
        Promise("kernel launches each way", 1, launches, at_most=True),
    ]


def on_cpu() -> list[Promise]:
    suite = {"suite": "cpu", "op": "train", "hot": False}
    return [
        Promise(
            "NCHW train, float32: x F.batch_norm, mean",
            2.5,
            mean_ratio(layout="nchw", dtype="float32", **suite),
        ),
        Promise(
            "NHWC train, float32: x F.batch_norm, mean",
            1.3,
            mean_ratio(layout="nhwc", dtype="float32", **suite),
        ),
        Promise(
            "train, bfloat16: x F.batch_norm, mean", 1.8, mean_ratio(dtype="bfloat16", **suite)
        ),
        *(
            Promise(
                f"any shape, {op}: x F.batch_norm, beyond the noise",
                1.0,
                least_ratio_beyond_noise(op=op),
            )
            for op in OPS
        ),
        Promise("forward beyond the cache: of the roof", 0.70, beyond_the_cache("forward")),
        Promise("backward beyond the cache: of the roof", 0.60, beyond_the_cache("backward")),
        Promise("host overhead: of nn.BatchNorm's", 1.0, overhead, at_most=True),
        Promise("peak memory: of F.batch_norm's", 1.0, peak_memory, at_most=True),
    ]


def beyond_the_cache(op: str) -> Callable[[dict], float | None]:
    def found(results: dict) -> float | None:
        rows = _rows(results, op=op, hot=False)
        return _least(r["of_roof"] for r in rows if r["tensor_bytes"] > results["cache_bytes"])

    return found


def judge(results: dict) -> list[dict]:
    promises = on_cuda() if results["header"]["device"] == "cuda" else on_cpu()
    judged = []
    for promise in promises:
        verdict, found = promise.holds(results)
        judged.append(
            {
                "measure": promise.measure,
                "wanted": promise.wanted,
                "at_most": promise.at_most,
                "found": found,
                "verdict": verdict,
            }
        )
    return judged


def text(judged: list[dict]) -> str:
    lines = ["acceptance"]
    for row in judged:
        wanted = f"{'<=' if row['at_most'] else '>='} {row['wanted']:g}"
        found = "" if row["found"] is None else f"{row['found']:.3f}"
        lines.append(f"  {row['measure']:58} {wanted:>8} {found:>8}  {row['verdict']}")
    return "\n".join(lines)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(text(judge(json.loads(Path(path).read_text()))))
