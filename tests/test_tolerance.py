"""The rule is a judge, so it is judged first: by numbers whose verdict is known."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import accuracy, assert_as_accurate_as

EPS = torch.finfo(torch.float32).eps
TRUTH = torch.linspace(-1.0, 1.0, 4 * 3 * 5, dtype=torch.float64).view(4, 3, 5)


def off_by(eps: float, truth: torch.Tensor = TRUTH, index=(3, 2, 4)) -> torch.Tensor:
    """The truth with one element moved by so many float32 eps of 1."""
    moved = truth.clone()
    moved[index] += eps * EPS
    return moved


@pytest.mark.parametrize(
    ("error", "peer", "ok"),
    [
        (0.9, 0.0, True),  # the spare eps: storing an exact result may cost half
        (1.1, 0.0, False),
        (2.9, 1.0, True),  # twice the peer
        (3.1, 1.0, False),
        (8.9, 500.0, True),  # the ceiling
        (9.1, 500.0, False),
        (9.1, None, False),  # which holds without a peer too
        (8.9, None, True),
    ],
)
def test_the_bound_is_where_the_rule_says(error, peer, ok):
    reference = None if peer is None else off_by(peer)
    assert accuracy(off_by(error), reference, TRUTH, dtype=torch.float32).ok is ok


def test_one_number_a_channel_has_four_spare_eps():
    truth = torch.ones(6, dtype=torch.float64)
    for error, ok in [(3.9, True), (4.1, False)]:
        assert accuracy(off_by(error, truth, 2), truth, truth, dtype=torch.float32).ok is ok


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["actual", "truth"])
def test_non_finite_is_right_only_where_the_truth_is(value, where):
    poisoned = TRUTH.float().clone()
    poisoned[0, 1, 2] = value
    clean = TRUTH.float()
    actual, truth = (poisoned, clean) if where == "actual" else (clean, poisoned)
    assert not accuracy(actual, clean, truth.double()).ok
    assert accuracy(poisoned, poisoned, poisoned.double()).ok


def test_a_nan_peer_excuses_nothing():
    assert not accuracy(
        off_by(50.0), torch.full_like(TRUTH, math.nan), TRUTH, dtype=torch.float32
    ).ok


def test_a_channel_with_a_small_scale_is_not_hidden_by_the_others():
    truth = TRUTH * torch.tensor([1e-4, 1.0, 1e4], dtype=torch.float64).view(1, 3, 1)
    wrong = truth.clone()
    wrong[:, 0] *= 1.001
    assert not accuracy(wrong, truth, truth, dtype=torch.float32).ok


def test_a_given_scale_forgives_cancellation_and_only_that():
    nothing = torch.zeros(4, 3, 5, dtype=torch.float64)
    assert not accuracy(off_by(0.5, nothing), nothing, nothing, dtype=torch.float32).ok
    assert accuracy(off_by(0.5, nothing), nothing, nothing, torch.ones(3), dtype=torch.float32).ok
    assert not accuracy(
        off_by(50.0, nothing), nothing, nothing, torch.ones(3), dtype=torch.float32
    ).ok


def test_below_the_smallest_normal_number_eps_stops_shrinking():
    truth = torch.full((4, 3, 5), 1e-6, dtype=torch.float64)
    stored = truth.half()  # subnormal: the spacing is 6e-8
    assert accuracy(stored, stored, truth).ok
    assert not accuracy(stored * 3, stored, truth).ok


def test_a_wrong_shape_is_an_infinite_error():
    assert accuracy(TRUTH[:2].float(), None, TRUTH).error == math.inf


def test_empty_tensors_are_right():
    empty = torch.empty(0, 3, 5)
    assert accuracy(empty, empty, empty.double()).ok


def test_the_assertion_names_what_is_wrong():
    with pytest.raises(AssertionError, match="dweight: error 50 eps, allowed 1 eps"):
        assert_as_accurate_as(
            off_by(50.0).float(), TRUTH, TRUTH, scale=torch.ones(3), name="dweight"
        )
