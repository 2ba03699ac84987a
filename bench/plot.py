"""Draws what bench.run measured: a roofline scatter, and ratios to F.batch_norm by shape.

    python -m bench.plot bench/results/<chip>/resnet50.json [--out DIR]

Writes roofline.png and ratios.png beside the JSON, or into DIR. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from . import OURS, PEER

COLOURS = {OURS: "#0b6e99", PEER: "#c8553d"}
MARKERS = {"forward": "o", "backward": "s", "inference": "^"}


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _about(results: dict) -> str:
    head = results["header"]
    return f"{head['chip']}, torch {head['torch']}, commit {head['commit']}"


def _of(results: dict, provider: str, **wanted) -> list[dict]:
    return [
        row
        for row in results["rows"]
        if row["provider"] == provider
        and "us" in row
        and not row["hot"]
        and all(row[key] == value for key, value in wanted.items())
    ]


def _largest_threads(results: dict) -> str | None:
    return max(results["roof"], key=lambda key: 0 if key == "None" else int(key))


def roofline(results: dict, path: Path) -> None:
    """GB/s over the size of a tensor; the roof is the copy of the same run."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    key = _largest_threads(results)
    for provider, colour in COLOURS.items():
        for op in MARKERS:
            rows = [r for r in _of(results, provider, op=op) if str(r["threads"]) == key]
            if rows:
                axes.scatter(
                    [row["tensor_bytes"] / 1e6 for row in rows],
                    [row["gb_per_s"] for row in rows],
                    s=22,
                    marker=MARKERS[op],
                    color=colour,
                    alpha=0.7,
                    linewidths=0,
                    label=f"{provider}, {op}",
                )
    roof = results["roof"][key] / 1e9
    axes.axhline(roof, color="black", linewidth=1)
    axes.annotate(
        f"copy, {roof:.0f} GB/s", (0.01, roof), xycoords=("axes fraction", "data"), va="bottom"
    )
    axes.axvline(results["cache_bytes"] / 1e6, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="size of x, MB (dotted: last-level cache)")
    axes.set(ylabel="GB/s, bytes that must move over time", title=_about(results))
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def ratios(results: dict, path: Path) -> None:
    """How many times faster than F.batch_norm, forward and backward together, shape by shape."""
    pyplot = _pyplot()
    rows = _of(results, OURS, op="train")
    threads = max((row["threads"] or 0 for row in rows), default=0)
    rows = [row for row in rows if (row["threads"] or 0) == threads and row["ratio"] is not None]
    kinds = sorted({(row["dtype"], row["layout"]) for row in rows})
    names = list(dict.fromkeys(row["shape"] for row in rows))
    height = max(3.0, 0.16 * len(names) * len(kinds) + 1.2)
    figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
    width = 0.8 / max(len(kinds), 1)
    for index, (dtype, layout) in enumerate(kinds):
        found = {
            row["shape"]: row["ratio"]
            for row in rows
            if (row["dtype"], row["layout"]) == (dtype, layout)
        }
        places = [place for place, name in enumerate(names) if name in found]
        axes.barh(
            [place + (index + 0.5) * width - 0.4 for place in places],
            [found[names[place]] for place in places],
            height=0.9 * width,
            label=f"{dtype}, {layout}",
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    suffix = f", {threads} threads" if threads else ""
    axes.set(
        xlabel="F.batch_norm's time over ours, forward + backward", title=_about(results) + suffix
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.splitlines()[0])
    p.add_argument("json", type=Path, nargs="+", help="results of bench.run; rows are put together")
    p.add_argument("--out", type=Path, help="folder for the pictures")
    args = p.parse_args(argv)
    results = json.loads(args.json[0].read_text())
    for path in args.json[1:]:
        more = json.loads(path.read_text())
        if more["header"]["chip"] != results["header"]["chip"]:
            p.error(f"{path} is of {more['header']['chip']}, not of {results['header']['chip']}")
        results["rows"] += more["rows"]
    out = args.out or args.json[0].parent
    out.mkdir(parents=True, exist_ok=True)
    for draw in (roofline, ratios):
        path = out / f"{draw.__name__}.png"
        draw(results, path)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
