"""Training runs: one in this process, or many in parallel ones."""

import multiprocessing
import os
import queue
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from digits_data import Images
from digits_network import Statistics, network
from digits_regimes import REGIMES, batches
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Recipe:
    """What all runs share."""

    epochs: int = 12
    learning_rate: float = 0.03  # of Adam at the first step; from there half a cosine to 0
    statistics: Statistics = field(default_factory=Statistics)


class Job(NamedTuple):
    regime: str
    normalizer: str
    seed: int


def train(
    job: Job,
    recipe: Recipe,
    images: Images,
    after_epoch: Callable[[Job], None] = lambda job: None,
) -> list[float]:
    """Validation accuracy in percent after each epoch, in eval mode (with the moving statistics).

    The seed decides initial weights and batches; both are the same for every normalizer.
    """
    regime = REGIMES[job.regime]
    shuffle = torch.Generator().manual_seed(job.seed)
    epochs = [batches(images.train_y, regime, shuffle) for _ in range(recipe.epochs)]
    steps = sum(len(epoch) for epoch in epochs)
    model = network(job.normalizer, recipe.statistics, regime, steps, images.classes, job.seed)
    model.to(images.train_x.device)
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    accuracies = []
    for epoch in epochs:
        model.train()
        for batch in epoch:
            optimizer.zero_grad()
            cross_entropy(model(images.train_x[batch]), images.train_y[batch]).backward()
            optimizer.step()
            decay.step()
        model.eval()
        with torch.no_grad():
            right = model(images.valid_x).argmax(1) == images.valid_y
        accuracies.append(100 * right.float().mean().item())
        after_epoch(job)
    return accuracies


def train_all(
    jobs: list[Job],
    recipe: Recipe,
    images: Images,
    device: str,
    processes: int,
    after_epoch: Callable[[Job], None],
) -> dict[Job, list[float]]:
    """`train` for every job, in several processes; the results do not depend on how many.

    Each has one thread: tensors this small are quicker without more.
    """
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    done_epochs = spawn.Queue()
    with ProcessPoolExecutor(
        processes, spawn, _start, (recipe, images, device, done_epochs)
    ) as pool:
        runs: dict[Job, Future] = {job: pool.submit(_run, job) for job in jobs}
        try:
            waiting = set(runs.values())
            while waiting:
                finished, waiting = wait(waiting, timeout=0.1, return_when=FIRST_EXCEPTION)
                for run in finished:
                    run.result()
                _report(done_epochs, after_epoch)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _report(done_epochs, after_epoch)
    return {job: run.result() for job, run in runs.items()}


def default_processes() -> int:
    """One a core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_shared: tuple[Recipe, Images, multiprocessing.Queue]  # of a worker process


def _start(recipe: Recipe, images: Images, device: str, done_epochs: multiprocessing.Queue) -> None:
    global _shared
    torch.set_num_threads(1)
    _shared = (recipe, images.to(device), done_epochs)


def _run(job: Job) -> list[float]:
    recipe, images, done_epochs = _shared
    return train(job, recipe, images, done_epochs.put)


def _report(done_epochs: multiprocessing.Queue, after_epoch: Callable[[Job], None]) -> None:
    while True:
        try:
            after_epoch(done_epochs.get_nowait())
        except queue.Empty:
            return
