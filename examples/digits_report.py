"""What the runs gave: a table, the conclusion that follows from its numbers, and a picture."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from digits_regimes import REGIMES
from digits_training import Job
from PIL import Image
from rich.table import Table

matplotlib.use("Agg")  # draws to a file; needs no display

import matplotlib.pyplot as plt  # noqa: E402  after the choice of backend

# Okabe and Ito's colours, which colour-blind people can tell apart; dashes for print in grey.
STYLES = {
    "BatchNorm": {"color": "#D55E00", "linestyle": "-"},
    "BatchRenorm": {"color": "#0072B2", "linestyle": "-"},
    "GroupNorm": {"color": "#009E73", "linestyle": (0, (4, 1.5))},
    "LayerNorm": {"color": "#B0679A", "linestyle": (0, (1, 1))},
}


TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5)
MOST = 99.9  # the scale has no 100


@dataclass(frozen=True)
class Results:
    """Validation accuracies in percent, after each epoch of each run."""

    curves: dict[Job, list[float]]

    @property
    def regimes(self) -> list[str]:
        return list(dict.fromkeys(job.regime for job in self.curves))

    @property
    def normalizers(self) -> list[str]:
        return list(dict.fromkeys(job.normalizer for job in self.curves))

    def of(self, regime: str, normalizer: str) -> list[list[float]]:
        """One curve a seed, in the order of the seeds."""
        jobs = sorted(job for job in self.curves if job[:2] == (regime, normalizer))
        return [self.curves[job] for job in jobs]

    def last(self, regime: str, normalizer: str) -> list[float]:
        return [curve[-1] for curve in self.of(regime, normalizer)]


def spread(values: list[float]) -> float:
    """Standard deviation over the seeds (of a sample: n - 1); 0 for one seed, which has none."""
    return stdev(values) if len(values) > 1 else 0.0


def table(results: Results) -> Table:
    """Accuracy after the last epoch. A row a normalizer, a column a regime, the best mean bold."""
    seeds = len(results.last(results.regimes[0], results.normalizers[0]))
    made = Table(
        title=f"Validation accuracy in %, mean ± standard deviation over {_count(seeds, 'seed')}"
    )
    made.add_column("normalizer")
    for regime in results.regimes:
        made.add_column(regime, justify="right")
    best = {r: max(mean(results.last(r, n)) for n in results.normalizers) for r in results.regimes}
    for normalizer in results.normalizers:
        cells = []
        for regime in results.regimes:
            values = results.last(regime, normalizer)
            text = (
                f"{mean(values):.1f} ± {spread(values):.1f}" if seeds > 1 else f"{mean(values):.1f}"
            )
            cells.append(f"[bold]{text}[/bold]" if mean(values) == best[regime] else text)
        made.add_row(normalizer, *cells)
    return made


@dataclass(frozen=True)
class Comparison:
    """One normalizer against another in one regime, on the same initial weights and batches."""

    regime: str
    gap: float  # difference of the mean accuracies, in points
    spread: float  # the larger of the two spreads over the seeds
    wins: int
    seeds: int

    @property
    def verdict(self) -> str:
        """ "ahead" or "behind" when the gap is more than the spread, "level" when it is not."""
        if abs(self.gap) <= self.spread:
            return "level"
        return "ahead" if self.gap > 0 else "behind"

    def __str__(self) -> str:
        by = (
            f"{self.gap:+.1f} points, spread {self.spread:.1f}"
            if self.seeds > 1
            else f"{self.gap:+.1f} points"
        )
        return f"{self.verdict} ({by}, better in {self.wins} of {_count(self.seeds, 'seed')})"


def compare(results: Results, regime: str, one: str, other: str) -> Comparison:
    first, second = results.last(regime, one), results.last(regime, other)
    return Comparison(
        regime,
        mean(first) - mean(second),
        max(spread(first), spread(second)),
        sum(a > b for a, b in zip(first, second, strict=True)),
        len(first),
    )


def conclusion(results: Results) -> list[str]:
    """Sentences that follow from the numbers, whoever wins."""
    if "BatchRenorm" not in results.normalizers:
        return []
    lines = []
    against_batch_norm = []
    if "BatchNorm" in results.normalizers:
        against_batch_norm = [
            compare(results, regime, "BatchRenorm", "BatchNorm") for regime in results.regimes
        ]
        lines.append("BatchRenorm against BatchNorm:")
        lines += [f"  {c.regime}: {c}." for c in against_batch_norm]

    others = [n for n in ("GroupNorm", "LayerNorm") if n in results.normalizers]
    better = []
    for other in others:
        comparisons = [compare(results, r, other, "BatchRenorm") for r in results.regimes]
        better += [(other, c) for c in comparisons if c.verdict == "ahead"]
    if better:
        lines.append("Better than BatchRenorm:")
        lines += [f"  {other} in {c.regime}: {c}." for other, c in better]
    elif others:
        lines.append(
            f"Nowhere is {' or '.join(others)} better than BatchRenorm by more than the spread."
        )

    if others and len({REGIMES[regime].classes for regime in results.regimes}) < len(
        results.regimes
    ):
        same = [regime for regime in results.regimes if not REGIMES[regime].classes]
        lines.append(
            f"{' and '.join(others)} do not see the batch: {', '.join(same)} are the same to them."
        )

    if against_batch_norm:
        lines.append(_advice(against_batch_norm, bool(better)))
    if len(results.last(results.regimes[0], "BatchRenorm")) == 1:
        lines.append("One seed has no spread: none of this is certain. Take more with --seeds.")
    return lines


def _advice(against_batch_norm: list[Comparison], others_better: bool) -> str:
    hard = [c for c in against_batch_norm if not REGIMES[c.regime].control]
    verdicts = {c.verdict for c in hard}
    if "ahead" not in verdicts:
        return "These numbers give no reason to take BatchRenorm instead of BatchNorm."
    names = " and ".join(c.regime for c in hard if c.verdict == "ahead")
    advice = f"These numbers speak for BatchRenorm instead of BatchNorm in {names}"
    if others_better:
        advice += "; where another normalizer is better, accuracy alone speaks for that one"
    return (
        f"{advice}. What BatchRenorm keeps of BatchNorm: it drops into its place, loads its "
        "checkpoints, and at inference it is one multiplication and addition a channel, which "
        "folds into the convolution before it and costs nothing. GroupNorm and LayerNorm take "
        "statistics of every input."
    )


def plot(results: Results, path: Path, caption: str) -> None:
    """A panel a regime: the mean over seeds after each epoch, a standard deviation to each side."""
    columns = min(2, len(results.regimes))
    rows = -(-len(results.regimes) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.8 * columns, 3.1 * rows + 0.5), sharey=True, squeeze=False
    )
    panels = list(axes.flat)
    for panel, regime in zip(panels, results.regimes, strict=False):
        _panel(panel, results, regime)
    for panel in panels[len(results.regimes) :]:
        panel.remove()
    panels[0].set_yscale("function", functions=(_stretched, _accuracy))  # shared by all
    bottom, top = _limits(results)
    panels[0].set_yticks([tick for tick in TICKS if bottom <= tick <= top])
    panels[0].set_ylim(bottom, top)
    for panel, regime in zip(panels, results.regimes, strict=False):
        _label_ends(panel, results, regime)
    for row in axes:
        row[0].set_ylabel("validation accuracy (%)")
    caption += (
        "\nLines: means over the seeds. Bands: one standard deviation. Errors on a log scale."
    )
    figure.text(0.01, 0.008, caption, fontsize=7.5, color="#555555", va="bottom")
    figure.tight_layout(
        rect=(0, 0.02 + 0.02 * (caption.count("\n") + 1), 1, 1), w_pad=1.5, h_pad=1.5
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with Image.open(path) as picture:
        few_colors = picture.convert("RGB").quantize(128)
    few_colors.save(path, optimize=True)  # a third of the bytes


def _panel(panel: plt.Axes, results: Results, regime: str) -> None:
    for normalizer in results.normalizers:
        by_epoch = list(zip(*results.of(regime, normalizer), strict=True))
        epochs = range(1, len(by_epoch) + 1)
        middle = [mean(values) for values in by_epoch]
        width = [spread(list(values)) for values in by_epoch]
        low = [m - w for m, w in zip(middle, width, strict=True)]
        high = [m + w for m, w in zip(middle, width, strict=True)]
        color = STYLES[normalizer]["color"]
        panel.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        panel.plot(epochs, middle, linewidth=1.8, marker="o", markersize=2.5, **STYLES[normalizer])
    panel.set_title(REGIMES[regime].title, loc="left", fontsize=10.5)
    panel.set_xlabel("epoch")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _label_ends(panel: plt.Axes, results: Results, regime: str) -> None:
    """The names and last means at the ends of the curves, moved apart where they would overlap."""
    low, high, apart = 0.02, 0.98, 0.075  # in heights of the panel
    ends = sorted((mean(results.last(regime, n)), n) for n in results.normalizers)
    bottom, top = (_stretched(limit) for limit in panel.get_ylim())
    places = [max((_stretched(end) - bottom) / (top - bottom), low) for end, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + apart)
    over = max(0.0, places[-1] - high)
    places = [place - over for place in places]
    for i in reversed(range(len(places) - 1)):
        places[i] = min(places[i], places[i + 1] - apart)
    for (end, normalizer), place in zip(ends, places, strict=True):
        panel.annotate(
            f"{normalizer} {end:.1f}",
            (1.015, place),
            xycoords="axes fraction",
            color=STYLES[normalizer]["color"],
            fontsize=8.5,
            fontweight="bold" if normalizer == "BatchRenorm" else "normal",
            va="center",
            annotation_clip=False,
        )


def _stretched(accuracy: float | np.ndarray) -> float | np.ndarray:
    """Accuracy in percent to a scale on which a tenth of the error is one unit up."""
    return -np.log10(np.maximum(100 - np.asarray(accuracy), 100 - MOST))


def _accuracy(stretched: float | np.ndarray) -> float | np.ndarray:
    return 100 - 10 ** -np.asarray(stretched)


def _limits(results: Results) -> tuple[float, float]:
    """What the panels show: the second half of the runs, where they differ."""
    late = [
        mean(values)
        for regime in results.regimes
        for normalizer in results.normalizers
        for values in _second_half(results.of(regime, normalizer))
    ]
    bottom = max(0.0, (min(late) // 10) * 10 - 10)
    return bottom, next((tick for tick in TICKS if tick > max(late)), MOST)


def _second_half(curves: list[list[float]]) -> list[tuple[float, ...]]:
    by_epoch = list(zip(*curves, strict=True))
    return by_epoch[len(by_epoch) // 2 :]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
