"""Checkpoints of other Batch Renorms, each peer a few lines of its own inference formula here."""

from __future__ import annotations

import math
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from batchrenorm_cuda import BatchRenorm1d, BatchRenorm2d, RenormSchedule, adopt

torch.set_num_threads(1)

C = 5
PAPER = RenormSchedule()


def numbers(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def loaded(state, layer=BatchRenorm1d, **options):
    module = layer(C, **options)
    assert str(module.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(not isinstance(t, nn.Parameter) for t in state.values())
    return module.eval()


def close(a, b):
    torch.testing.assert_close(a.double(), torch.as_tensor(b).double(), rtol=1e-5, atol=1e-6)


def limits(module):
    return RenormSchedule.from_tensor(module.schedule)


def images():
    return torch.randn(2, C, 3, 3, generator=torch.Generator().manual_seed(9))


def rows():
    return torch.randn(4, C, generator=torch.Generator().manual_seed(9))


def column(t):
    return t.view(-1, 1, 1)


def ludvb(seed=0):
    names = ("weight", "bias", "running_mean", "running_std")
    state = {name: numbers(C, seed=seed + i) for i, name in enumerate(names)}
    return state | {"num_batches_tracked": torch.tensor(12_345)}


def test_ludvb():
    s = ludvb()
    module = loaded(adopt.from_ludvb(s), **adopt.DEFAULTS["ludvb"])
    close(module(rows()), (rows() - s["running_mean"]) / s["running_std"] * s["weight"] + s["bias"])
    assert module.num_batches_tracked == 12_345
    # Its limits are the paper's, written as two straight lines with their ends clipped.
    r_max, d_max = limits(module).limits_at(12_345)
    assert math.isclose(r_max, 2 / 35000 * 12_345 + 25 / 35)
    assert math.isclose(d_max, 5 / 20000 * 12_345 - 25 / 20)


def test_ludvb_without_affine():
    s = ludvb()  # it has a weight and a bias all the same
    module = loaded(adopt.from_ludvb(s, affine=False), affine=False)
    close(module(rows()), (rows() - s["running_mean"]) / s["running_std"])


def sb3(seed=0):
    names = ("scale", "bias", "ra_mean", "ra_var")
    state = {name: numbers(C, seed=seed + i) for i, name in enumerate(names)}
    return state | {"steps": torch.tensor(100_000)}


@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_sb3(eps):
    s = sb3()
    module = loaded(adopt.from_sb3(s, eps=eps))
    expected = (rows() - s["ra_mean"]) / (s["ra_var"] + eps).sqrt() * s["scale"] + s["bias"]
    close(module(rows()), expected)
    assert module.num_batches_tracked == 100_000
    # It renormalizes once steps > 100,000.
    assert limits(module).limits_at(100_000) == (1, 0)
    assert limits(module).limits_at(100_001) == (3, 5)


def test_sb3_without_affine():
    s = sb3()
    module = loaded(adopt.from_sb3(s, affine=False), affine=False)
    close(module(rows()), (rows() - s["ra_mean"]) / (s["ra_var"] + 1e-3).sqrt())


def torchrl(seed=0):
    names = ("weight", "bias", "running_mean", "running_var")
    state = {name: numbers(C, seed=seed + i) for i, name in enumerate(names)}
    return state | {"num_batches_tracked": torch.tensor(77)}


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_torchrl(eps):
    s = torchrl()
    module = loaded(adopt.from_torchrl(s, eps=eps), BatchRenorm2d)
    centred = images() - column(s["running_mean"])
    scale = column(s["weight"]) / column((s["running_var"] + eps).sqrt())
    close(module(images()), centred * scale + column(s["bias"]))
    assert module.num_batches_tracked == 77
    assert limits(module) == RenormSchedule(10_000, 3.0, 10_000, 5.0, 10_000)


def avalanche():
    shape = (1, C, 1, 1)
    names = ("gamma", "beta", "running_avg_mean", "running_avg_std")
    return {name: numbers(*shape, seed=i) for i, name in enumerate(names)}


def test_avalanche_with_statistics():
    s = avalanche()
    module = loaded(adopt.from_avalanche(s), BatchRenorm2d)
    x_norm = (images() - s["running_avg_mean"]) / s["running_avg_std"]
    close(module(images()), s["gamma"] * x_norm + s["beta"])
    assert limits(module) == RenormSchedule.constant(3, 5)


def test_avalanche_without_statistics_is_said_aloud():
    s = {f"net.bn.{name}": avalanche()[name] for name in ("gamma", "beta")}
    with pytest.warns(UserWarning, match=r"1 layers \(net.bn, ...\) come without statistics"):
        state = adopt.from_avalanche(s)
    module = loaded({name.removeprefix("net.bn."): t for name, t in state.items()}, BatchRenorm2d)
    close(module(images()), s["net.bn.gamma"] * images() + s["net.bn.beta"])
    assert module.num_batches_tracked == 0 and limits(module) == PAPER


def katago(gamma=True):
    s = {name: numbers(1, C, 1, 1, seed=i) for i, name in enumerate(("gamma", "beta"))}
    s |= {name: numbers(C, seed=i) for i, name in enumerate(("running_mean", "running_std"), 2)}
    s |= {f"renorm_{name}": numbers(C, seed=i) for i, name in enumerate(s, 5) if "run" in name}
    s |= {f"renorm_{name}": torch.tensor(0.5) for name in ("upper_rclippage", "dclippage")}
    if not gamma:
        del s["gamma"]
    return s


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("center_1", [False, True])
def test_katago(gamma, scale, center_1):
    s = katago(gamma)
    options = {"gamma_center_1": center_1 and gamma}
    module = loaded(adopt.from_katago(s, scale=scale, **options), BatchRenorm2d)
    x_norm = (images() - column(s["running_mean"])) / column(s["running_std"])
    factor = (s["gamma"] + (1 if center_1 else 0) if gamma else 1) * (scale or 1)
    close(module(images()), x_norm * factor + s["beta"])


def test_katago_scales_by_name():
    state = {f"blocks.{i}.norm.{n}": t for i in range(2) for n, t in katago(False).items()}
    scales = {"blocks.0.norm": 0.25, "blocks.1.norm": None}
    state = adopt.from_katago(state, scale=scales.__getitem__)
    assert state["blocks.0.norm.weight"].tolist() == [0.25] * C
    assert state["blocks.1.norm.weight"].tolist() == [1.0] * C


def keras(scale=True, center=True, array=np.asarray):
    names = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev")
    names += ("renorm_mean", "renorm_stddev")
    arrays = {n: array(numbers(C, seed=i).numpy()) for i, n in enumerate(names)}
    absent = ["gamma"] * (not scale) + ["beta"] * (not center)
    return {name: a for name, a in arrays.items() if name not in absent}


def keras_infers(arrays, x, epsilon):
    """tf.nn.batch_normalization: channels last."""
    y = (x - arrays["moving_mean"]) / np.sqrt(arrays["moving_variance"] + epsilon)
    return y * arrays.get("gamma", 1) + arrays.get("beta", 0)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("epsilon", [1e-3, 0.3])
def test_keras(scale, center, epsilon):
    arrays = keras(scale, center)
    state = adopt.from_keras(arrays, epsilon=epsilon)
    module = loaded(state, BatchRenorm2d, affine="weight" in state, bias="bias" in state)
    x = images().permute(0, 2, 3, 1).numpy()
    close(module(images()).permute(0, 2, 3, 1), keras_infers(arrays, x, epsilon))
    assert limits(module) == RenormSchedule.constant(math.inf, math.inf)


class Variable:
    """As those of TensorFlow."""

    def __init__(self, value):
        self.value = value

    def numpy(self):
        return self.value


@pytest.mark.parametrize("array", [Variable, lambda a: a.tolist(), np.float64, torch.tensor])
def test_keras_names_and_kinds_of_arrays(array):
    plain = keras()
    arrays = {f"net/norm_3/{n}:0": array(a) for n, a in keras().items()}
    state = adopt.from_keras(arrays)
    assert (state["running_std"].dtype == torch.float64) == (array is np.float64)
    close(loaded(state)(rows()), keras_infers(plain, rows().numpy(), 1e-3))


def test_keras_clipping():
    def r_and_d(clipping):
        return limits(loaded(adopt.from_keras(keras(), renorm_clipping=clipping))).limits_at(0)

    assert r_and_d({"rmax": 4, "rmin": 0.25, "dmax": 2}) == (4, 2)
    assert r_and_d({"rmax": 4}) == (4, math.inf)
    with pytest.raises(ValueError, match="renorm_clipping must have rmin = 1 / rmax"):
        r_and_d({"rmax": 4, "rmin": 0})
    with pytest.raises(ValueError, match="renorm_clipping must have rmax, rmin, dmax only"):
        r_and_d({"r_max": 4})


def flax(members=(), scale=True):
    stats = {name: numbers(*members, C, seed=i).numpy() for i, name in enumerate(("mean", "var"))}
    for name, value in (("r_max", 2), ("d_max", 4), ("steps", 123)):
        stats[name] = np.full(members, value)
    params = {n: numbers(*members, C, seed=i).numpy() for i, n in enumerate(("scale", "bias"), 5)}
    frozen = types.MappingProxyType  # a mapping that is no dict, as flax's FrozenDict
    dense = {"kernel": np.ones((3, 3))}
    return {
        "params": frozen({"Critic_0": {"Dense_0": dense} | ({"BRN_1": params} if scale else {})}),
        "batch_stats": frozen({"Critic_0": frozen({"BRN_1": frozen(stats)})}),
    }


def flax_infers(variables, x, epsilon, member=...):
    s = variables["batch_stats"]["Critic_0"]["BRN_1"]
    without = {"scale": np.ones(C), "bias": np.zeros(C)}
    p = variables["params"]["Critic_0"].get("BRN_1", without)
    y = (x - s["mean"][member]) / np.sqrt(s["var"][member] + epsilon)
    return y * p["scale"][member] + p["bias"][member]


@pytest.mark.parametrize("layer", [None, "Critic_0/BRN_1"])
@pytest.mark.parametrize("epsilon", [1e-3, 0.3])
def test_flax(layer, epsilon):
    module = loaded(adopt.from_flax(flax(), layer, epsilon=epsilon, warm_up_steps=100))
    close(module(rows()), flax_infers(flax(), rows().numpy(), epsilon))
    assert module.num_batches_tracked == 123
    assert limits(module).limits_at(99) == (1, 0) and limits(module).limits_at(100) == (2, 4)


def test_flax_without_scale_and_bias():
    module = loaded(adopt.from_flax(flax(scale=False)), affine=False)
    close(module(rows()), flax_infers(flax(scale=False), rows().numpy(), 1e-3))


@pytest.mark.parametrize("member", [0, 1])
def test_flax_ensemble(member):
    ensemble = flax((2,))
    module = loaded(adopt.from_flax(ensemble, member=np.int64(member)))
    close(module(rows()), flax_infers(ensemble, rows().numpy(), 1e-3, member))
    assert module.num_batches_tracked == 123
    for wrong in (None, 2):
        with pytest.raises(ValueError, match="member must be one of the 2 in the ensemble, got"):
            adopt.from_flax(ensemble, member=wrong)


PEERS = {
    "ludvb": (ludvb, adopt.from_ludvb, "running_std"),
    "sb3": (sb3, adopt.from_sb3, "ra_var"),
    "torchrl": (torchrl, adopt.from_torchrl, "running_var"),
    "avalanche": (avalanche, adopt.from_avalanche, "running_avg_std"),
    "katago": (katago, adopt.from_katago, "running_std"),
}


def in_a_model(state):
    linear = {"0.weight": torch.ones(C, 3), "0.bias": torch.ones(C)}
    return linear | {f"1.{name}": t for name, t in state.items()} | {"2.weight": torch.ones(2, C)}


@pytest.mark.parametrize("peer", PEERS)
def test_a_whole_model_is_adopted_and_the_rest_of_it_stays(peer):
    make, adopted, _ = PEERS[peer]
    given = in_a_model(make())
    before = {name: t.clone() for name, t in given.items()}
    state = adopted(given)
    layers = [nn.Linear(3, C), BatchRenorm1d(C), nn.Linear(C, 2, bias=False)]
    model = nn.Sequential(*layers).eval()
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    close(model[1](rows()), loaded(adopted(make()))(rows()))
    assert state["0.weight"] is given["0.weight"]
    assert given.keys() == before.keys() and all(torch.equal(given[n], before[n]) for n in given)
    memory = {t.data_ptr() for name, t in given.items() if name.startswith("1.")}
    assert not memory & {t.data_ptr() for name, t in state.items()}  # assign=True is harmless


@pytest.mark.parametrize("peer", PEERS)
def test_a_schedule_of_ones_own(peer):
    make, adopted, _ = PEERS[peer]
    schedule = RenormSchedule(1, 2, 3, 4, 5)
    assert limits(loaded(adopted(make(), schedule=schedule))) == schedule
    with pytest.raises(TypeError, match="schedule must be a RenormSchedule, got int"):
        adopted(make(), schedule=3)
    for single, given in ((adopt.from_keras, keras()), (adopt.from_flax, flax())):
        assert limits(loaded(single(given, schedule=schedule))) == schedule


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("bad", [math.nan, -2.0, math.inf])
def test_statistics_that_cannot_be_used_are_named(peer, bad):
    make, adopted, name = PEERS[peer]
    state = make()
    state[name].view(-1)[1] = bad
    with pytest.raises(ValueError, match=r"1\b.* must be (finite and > 0|>= 0), got (nan|-2|inf)"):
        adopted(in_a_model(state))


@pytest.mark.parametrize("peer", PEERS)
def test_a_checkpoint_of_something_else_is_refused(peer):
    make, adopted, _ = PEERS[peer]
    with pytest.raises(ValueError, match="state must have layers with .* got model, optimizer"):
        adopted({"model": make(), "optimizer": {}})
    with pytest.raises(TypeError, match="state must be a mapping of names to tensors, got list"):
        adopted(list(make()))
    state = make()
    name = next(iter(state))
    with pytest.raises(TypeError, match=f"{name} must be an array, got (str|dict)"):
        adopted(state | {name: "weights"})
    with pytest.raises(ValueError, match=r"must have (5|4) channels, got \((5|4|1, 4, 1, 1),?\)"):
        short = state[name]
        adopted(state | {name: short[:, :4] if short.dim() == 4 else short[:4]})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adopt.from_sb3(sb3(), eps=-1), ValueError, "eps must be finite and >= 0, got -1"),
        (
            lambda: adopt.from_sb3(sb3(), eps=10**400),
            ValueError,
            "eps must be finite and >= 0, got",
        ),
        (lambda: adopt.from_sb3({**sb3(), 3: 1}), TypeError, "state must be .* got the key 3"),
        (lambda: adopt.from_keras({0: 1}), TypeError, "arrays must be a mapping .* got the key 0"),
        (
            lambda: adopt.from_sb3({**sb3(), "steps": torch.tensor([1, 2])}),
            ValueError,
            r"the step of the layer must be one number >= 0, got \[1, 2\]",
        ),
        (
            lambda: adopt.from_sb3({**sb3(), "steps": torch.tensor(-1)}),
            ValueError,
            "the step of the layer must be one number >= 0, got -1",
        ),
        (
            lambda: adopt.from_sb3({**sb3(), "steps": torch.tensor(math.nan)}),
            ValueError,
            "the step of the layer must be one number >= 0, got nan",
        ),
        (
            lambda: adopt.from_katago(katago(), scale="x"),
            TypeError,
            "scale must be a finite number, got 'x'",
        ),
        (
            lambda: adopt.from_katago(in_a_model(katago()), scale=lambda name: math.nan),
            TypeError,
            "scale must be a finite number, got nan for ",
        ),
        (
            lambda: adopt.from_keras(keras(), renorm_clipping={"rmax": 0}),
            ValueError,
            "renorm_clipping must have rmax >= 1, got {'rmax': 0}",
        ),
        (
            lambda: adopt.from_flax(flax((2,)), member="a"),
            ValueError,
            "member must be one of the 2 in the ensemble, got 'a'",
        ),
        (lambda: adopt.from_torchrl(torchrl(), eps="1"), TypeError, "eps must be a number"),
        (lambda: adopt.from_keras({"gamma": [1.0]}), ValueError, "have moving_mean, got gamma"),
        (
            lambda: adopt.from_keras({"a/gamma": [1.0], "b/gamma": [1.0]}),
            ValueError,
            "arrays must be those of one layer, got gamma twice",
        ),
        (lambda: adopt.from_keras([1]), TypeError, "arrays must be a mapping .* got list"),
        (
            lambda: adopt.from_flax(flax(), "BRN"),
            ValueError,
            "one of .'Critic_0/BRN_1'., got 'BRN'",
        ),
        (lambda: adopt.from_flax({}), TypeError, "variables.'batch_stats'. must be .* NoneType"),
        (lambda: adopt.from_flax([]), TypeError, "variables must be a mapping .* got list"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_torchrl_layers_among_batch_norms_are_picked_by_name():
    state = {f"{i}.{name}": t for i in range(2) for name, t in torchrl(i).items()}
    model = nn.Sequential(nn.BatchNorm1d(C), BatchRenorm1d(C))
    assert "matched" in str(model.load_state_dict(adopt.from_torchrl(state, layers="1")))


def test_layers_of_this_library_are_left_as_they_are():
    ours = {f"0.{name}": t for name, t in BatchRenorm1d(C).state_dict().items()}
    state = adopt.from_ludvb(ours | {f"1.{name}": t for name, t in ludvb().items()})
    assert all(state[name] is t for name, t in ours.items())


def test_half_precision_states_and_metadata():
    state = nn.Module()
    for name, t in sb3().items():
        state.register_buffer(name, t.half() if t.is_floating_point() else t)
    state = state.state_dict()
    adopted = adopt.from_sb3(state)
    assert adopted._metadata == state._metadata
    assert adopted["running_std"].dtype == adopted["weight"].dtype == torch.float32
    loaded(adopted)


def test_defaults_are_arguments():
    peers = {name.removeprefix("from_") for name in vars(adopt) if name.startswith("from_")}
    assert adopt.DEFAULTS.keys() == peers
    for arguments in adopt.DEFAULTS.values():
        BatchRenorm1d(C, **arguments)


def test_a_constant_channel_has_the_floor_of_ludvb():
    module = BatchRenorm1d(1, **{**adopt.DEFAULTS["ludvb"], "momentum": 1.0})
    module(torch.ones(4, 1))
    close(module.running_std, [0.0 + 1e-3])  # its std + eps


def test_nothing_else_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make, adopted, _ in PEERS.values():
            adopted(make())


def test_statistics_that_are_whole_numbers():
    """In float32 like any others; a root is none."""
    state = adopt.from_keras({"moving_mean": [0, 1], "moving_variance": np.array([2, 3])})
    expected = (torch.tensor([2.0, 3.0]) + 1e-3).sqrt()
    torch.testing.assert_close(state["running_std"], expected, check_dtype=True)
    assert state["running_mean"].dtype == torch.float32


def test_layers_that_no_name_fits():
    state = BatchRenorm1d(3).state_dict(prefix="a.")
    state = {k.replace("running_std", "running_var"): t for k, t in state.items()}
    state.pop("a.schedule")
    with pytest.raises(ValueError, match="and a name like 'b', got a."):
        adopt.from_torchrl(state, layers="b")


@pytest.mark.parametrize("limit", ["a", [1]], ids=str)
def test_limits_of_keras_that_are_no_numbers(limit):
    given = {"moving_mean": [0.0], "moving_variance": [1.0]}
    with pytest.raises(TypeError, match="renorm_clipping must have numbers, got"):
        adopt.from_keras(given, renorm_clipping={"rmax": limit})
