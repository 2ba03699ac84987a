"""Training in several processes, in real gloo groups of 2 and 4 of them: the checks of
sync_checks.py and ddp_checks.py, run by ranks.py, one test a check and world."""

from __future__ import annotations

import inspect

import ddp_checks
import pytest
import ranks
import sync_checks


def checks_of(module) -> list[str]:
    return [
        name
        for name, f in vars(module).items()
        if inspect.isfunction(f)
        and f.__module__ == module.__name__
        and [*inspect.signature(f).parameters] == ["rank"]
    ]


LAST = "a_killed_rank_is_an_error"  # there is no world after it
ON_GPUS = "equals_one_process_on_gpus"  # test_cuda.py runs it
SYNC = [name for name in checks_of(sync_checks) if name not in (LAST, ON_GPUS)]
IN_TWO = [*SYNC, *checks_of(ddp_checks)]
IN_FOUR = [name for name in SYNC if name != "compiled_it_is_the_same"]  # which costs seconds


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What came of every selected check, by world, rank and check."""
    wanted: dict[int, list[str]] = {}
    for item in request.session.items:
        if item.module is request.module and "outcomes" in getattr(item, "fixturenames", ()):
            called = item.callspec.params
            wanted.setdefault(called["world"], []).append(called["check"])
    return {
        world: ranks.run(world, checks, tmp_path_factory.mktemp(f"world{world}"))
        for world, checks in wanted.items()
    }


def came_to(outcome: dict[str, str], check: str) -> str:
    return outcome.get(check, f"not run, or not finished\n{outcome['log'][-2000:]}")


@pytest.mark.parametrize(
    ("check", "world"), [(name, 2) for name in IN_TWO] + [(name, 4) for name in IN_FOUR]
)
def test_together(outcomes, world, check):
    for rank, outcome in enumerate(outcomes[world]):
        assert came_to(outcome, check) == "passed", f"on rank {rank}"


@pytest.mark.parametrize(("check", "world"), [(LAST, 2)])
def test_a_killed_rank_is_an_error(outcomes, world, check):
    """And not a hang."""
    survivor, killed = outcomes[world]
    assert came_to(survivor, check) == "passed"
    assert check not in killed
