"""What torch.ops.batchrenorm does with a direct caller's arguments.

Python users meet ValueErrors before any of this; here a mistake must be one RuntimeError, and never
a wild access. Every memory format gives the same values; an empty batch changes nothing.
"""

import pytest
import torch

from batchrenorm_cuda import _C

ops = torch.ops.batchrenorm


def forward(x, **changes):
    channels = x.shape[1] if x.dim() > 1 else 1
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    arguments = dict(
        weight=torch.rand(channels, dtype=real, device=x.device) + 0.5,
        bias=torch.randn(channels, dtype=real, device=x.device),
        running_mean=torch.zeros(channels, dtype=real, device=x.device),
        running_std=torch.ones(channels, dtype=real, device=x.device),
        num_batches_tracked=torch.tensor(0, device=x.device),
        schedule=None, momentum=0.1, eps=1e-5, r_max=3.0, d_max=5.0, skip_nonfinite=False,
    )  # fmt: skip
    arguments.update(changes)
    return ops.forward(x, *arguments.values())


REFUSALS = [
    # argument, value, what the message must say
    ("weight", torch.ones(4), r"weight must have shape \[3\], got \[4\]"),
    ("weight", torch.ones(3, 1), r"weight must have shape \[3\], got \[3, 1\]"),
    ("bias", torch.ones(3).double(), "bias must be float32 for x in float32, got float64"),
    ("bias", torch.ones(3).half(), "bias must be float32 for x in float32, got float16"),
    ("running_mean", torch.ones(32), r"running_mean must have shape \[3\], got \[32\]"),
    ("running_mean", torch.ones(6)[::2], "running_mean must be contiguous"),
    ("running_std", torch.ones(1).expand(3), "running_std must be contiguous"),
    ("running_std", torch.ones(3, dtype=torch.int32), "running_std must be float32 .*got Int"),
    ("running_std", None, "running_mean and running_std must be given together"),
    (
        "num_batches_tracked",
        torch.tensor(0.0),
        "num_batches_tracked must be one int64, got float32",
    ),
    ("num_batches_tracked", torch.zeros(2, dtype=torch.long), r"got int64 of shape \[2\]"),
    ("schedule", torch.zeros(5), r"schedule must be float64 of shape \[5\], got float32"),
    ("schedule", torch.zeros(4).double(), r"schedule must be .* got float64 of shape \[4\]"),
    ("momentum", 1.5, r"momentum must be in \[0, 1\], got 1.5"),
    ("momentum", -1.0, r"momentum must be in \[0, 1\], got -1"),
    ("momentum", float("nan"), "momentum must be"),
    ("eps", -1e-5, "eps must be at least 0, got -1e-05"),
    ("eps", float("nan"), "eps must be"),
    ("r_max", 0.5, "r_max must be at least 1, got 0.5"),
    ("r_max", float("nan"), "r_max must be"),
    ("d_max", -1.0, "d_max must be at least 0, got -1"),
]


@pytest.mark.parametrize(("name", "value", "complaint"), REFUSALS, ids=lambda v: str(v)[:40])
def test_a_refusal_names_the_argument_and_changes_nothing(name, value, complaint):
    state = dict(
        running_mean=torch.zeros(3), running_std=torch.ones(3), num_batches_tracked=torch.tensor(7)
    )
    before = {key: tensor.clone() for key, tensor in state.items()}
    with pytest.raises(RuntimeError, match=complaint) as refusal:
        forward(torch.randn(4, 3, 5), **{**state, name: value})
    assert "csrc" not in str(refusal.value)  # no path, no line
    for key, tensor in state.items():
        assert torch.equal(tensor, before[key])


def merge(gathered, dtype=torch.float32, **changes):
    arguments = dict(
        running_mean=torch.zeros(3), running_std=torch.ones(3),
        num_batches_tracked=torch.tensor(0), schedule=None,
        momentum=0.1, eps=1e-5, r_max=3.0, d_max=5.0, skip_nonfinite=False,
    )  # fmt: skip
    arguments.update(changes)
    return ops.merge(gathered, dtype, *arguments.values())


MESSAGES = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 1], [3.0, 2, 1, 6, 5, 4, 7, 0]]).double()


@pytest.mark.parametrize(("name", "value", "complaint"), REFUSALS[4:], ids=lambda v: str(v)[:40])
def test_merge_refuses_what_forward_refuses(name, value, complaint):
    state = dict(
        running_mean=torch.zeros(3), running_std=torch.ones(3), num_batches_tracked=torch.tensor(7)
    )
    before = {key: tensor.clone() for key, tensor in state.items()}
    with pytest.raises(RuntimeError, match=complaint) as refusal:
        merge(MESSAGES, **{**state, name: value})
    assert "csrc" not in str(refusal.value)
    for key, tensor in state.items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize(
    ("gathered", "dtype", "complaint"),
    [
        (MESSAGES.float(), torch.float32, r"gathered must be float64 of shape \[ranks, 2 \* C"),
        (MESSAGES[0], torch.float32, r"got float64 of shape \[8\]"),
        (MESSAGES[:0], torch.float32, r"got float64 of shape \[0, 8\]"),
        (MESSAGES[:, :7], torch.float32, r"got float64 of shape \[2, 7\]"),
        (MESSAGES[:, :2], torch.float32, r"got float64 of shape \[2, 2\]"),
        (MESSAGES[:, :6], torch.float32, r"running_mean must have shape \[2\], got \[3\]"),
        (MESSAGES, torch.float64, "running_mean must be float64 for x in float64, got float32"),
        (MESSAGES, torch.int64, "dtype must be float32, float16, bfloat16 or float64, got int64"),
    ],
    ids=lambda v: str(v)[:30].replace("\n", ""),
)
def test_merge_refuses_messages_that_are_none(gathered, dtype, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        merge(gathered, dtype)


def test_merge_takes_strided_messages():
    strided = torch.stack([MESSAGES, MESSAGES], 2)[..., 0]
    for got, wanted in zip(merge(strided), merge(MESSAGES), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("dy", torch.ones(4, 3, 6), r"dy must have the shape of x, \[4, 3, 5\]"),
        ("dy", torch.ones(4, 3, 5).half(), "dy must be float32 as x, got float16"),
        ("weight", torch.ones(2), r"weight must have shape \[3\]"),
        ("stats", torch.ones(4, 3), r"stats must have shape \[5, 3\], got \[4, 3\]"),
        ("sums", torch.ones(2, 3), r"sums must be float64 of shape \[2, 3\], got float32"),
        ("sums", torch.ones(3, 2).double(), r"sums must be .* got float64 of shape \[3, 2\]"),
        ("total", torch.ones(1).double(), r"total must be float64 of shape \[2\], got float64"),
    ],
    ids=lambda v: str(v)[:30].replace("\n", ""),
)
def test_backward_project_refuses(name, value, complaint):
    arguments = dict(
        dy=torch.randn(4, 3, 5), x=torch.randn(4, 3, 5), weight=None, stats=torch.ones(5, 3),
        sums=torch.ones(2, 3).double(), total=torch.ones(2).double(),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=complaint):
        ops.backward_project(*{**arguments, name: value}.values())


@pytest.mark.parametrize("name", ["dy", "stats"])
def test_backward_sums_refuses(name):
    arguments = dict(dy=torch.randn(4, 3, 5), x=torch.randn(4, 3, 5), stats=torch.ones(5, 3))
    with pytest.raises(RuntimeError, match=f"{name} must have"):
        ops.backward_sums(*{**arguments, name: torch.ones(2, 2)}.values())


def test_tensors_of_different_devices_are_refused():
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    x, column, elsewhere = torch.randn(4, 3), torch.ones(3), torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="weight must be on the device of x, cpu, got"):
        ops.inference.default.redispatch(cpu, x, elsewhere, None, column, column)


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (torch.randn(4), r"x must have shape \[N, C, ...\], got \[4\]"),
        (torch.randn(4, 0, 5), "x must have at least one channel"),
        (torch.ones(4, 3, dtype=torch.int32), "x must be float32, float16, bfloat16 or float64"),
        (torch.ones(4, 3, dtype=torch.cfloat), "x must be float32, float16, bfloat16 or float64"),
    ],
    ids=["1-D", "no channels", "int32", "complex64"],
)
def test_x_is_refused(x, complaint):
    stats = torch.zeros(5, 3)
    column = torch.ones(3)
    with pytest.raises(RuntimeError, match=complaint):
        ops.forward(x, *[None] * 6, 0.1, 1e-5, 1.0, 0.0, False)
    with pytest.raises(RuntimeError, match=complaint):
        ops.renormalize(x, None, None, stats)
    with pytest.raises(RuntimeError, match=complaint):
        ops.inference(x, None, None, column, column)
    with pytest.raises(RuntimeError, match=complaint):
        ops.backward(x, x, None, stats)
    with pytest.raises(RuntimeError, match=complaint):
        ops.inference_backward(x, x, None, column, column)
    with pytest.raises(RuntimeError, match=complaint):
        ops.moments(x, True)
    with pytest.raises(RuntimeError, match=complaint):
        ops.backward_sums(x, x, stats)
    exchanged = torch.zeros(2, 3).double(), torch.zeros(2).double()
    with pytest.raises(RuntimeError, match=complaint):
        ops.backward_project(x, x, None, stats, *exchanged)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (1, 1)], ids=str)
def test_one_value_per_channel_is_refused(shape):
    """Its deviation from itself is 0 whatever it is, so nothing would be learned. A compiled model
    may get there with a batch size that it was not traced with."""
    state = dict(
        running_mean=torch.zeros(shape[1]),
        running_std=torch.ones(shape[1]),
        num_batches_tracked=torch.tensor(7),
    )
    before = {key: tensor.clone() for key, tensor in state.items()}
    with pytest.raises(RuntimeError, match=r"x must have more than one value per channel.*got \[1"):
        forward(torch.randn(shape), **state)
    for key, tensor in state.items():
        assert torch.equal(tensor, before[key])


def test_what_counts_needs_a_counter():
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="schedule needs num_batches_tracked"):
        forward(x, num_batches_tracked=None, schedule=torch.zeros(5).double())
    with pytest.raises(RuntimeError, match="momentum=None.* needs num_batches_tracked"):
        forward(x, num_batches_tracked=None, momentum=None)


@pytest.mark.parametrize(
    ("dy", "stats", "weight", "complaint"),
    [
        (
            torch.randn(4, 3, 6),
            torch.zeros(5, 3),
            None,
            r"dy must have the shape of x, \[4, 3, 5\]",
        ),
        (torch.randn(4, 15), torch.zeros(5, 3), None, "dy must have the shape of x"),
        (torch.randn(4, 3, 5).double(), torch.zeros(5, 3), None, "dy must be float32 as x"),
        (
            torch.randn(4, 3, 5),
            torch.zeros(4, 3),
            None,
            r"stats must have shape \[5, 3\], got \[4, 3\]",
        ),
        (torch.randn(4, 3, 5), torch.zeros(5, 3), torch.ones(2), r"weight must have shape \[3\]"),
    ],
)
def test_backward_refuses(dy, stats, weight, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        ops.backward(dy, torch.randn(4, 3, 5), weight, stats)


def together(x, dy, ranks=2):
    """What several ranks compute that all have the same batch: y, dx, dweight, dbias, stats,
    total."""
    message = ops.moments(x, True)
    numbers = (None, None, None, None, 0.1, 1e-5, 1.0, 0.0, False)
    stats, total = ops.merge(message.expand(ranks, -1), x.dtype, *numbers)
    sums, dweight, dbias = ops.backward_sums(dy, x, stats)
    dx = ops.backward_project(dy, x, None, stats, sums * ranks, total)
    return ops.renormalize(x, None, None, stats), dx, dweight, dbias, stats, total


DENSE = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(2))

# Tensors with the values of DENSE, and whether y has the same strides, or those of which copy.
FORMATS = {
    "contiguous": (lambda x: x, "same"),
    "channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), "same"),
    "every other row": (lambda x: x.repeat_interleave(2, 0)[::2], "contiguous"),
    "padded rows": (lambda x: torch.cat([x, x], 3)[..., :3], "contiguous"),
    "channels of a wider channels_last": (
        lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :5],
        "channels_last",
    ),
    "transposed plane": (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "contiguous"),
    "batch innermost": (
        lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "contiguous",
    ),
    "odd storage offset": (
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
        "same",
    ),
}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dy_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_memory_format_gives_the_same_values(format_, dy_format, dtype):
    make, becomes = FORMATS[format_]
    dense = DENSE.to(dtype)
    x = make(dense)
    assert torch.equal(x, dense)
    y, stats = forward(x, weight=None, bias=None)
    expected, expected_stats = forward(dense, weight=None, bias=None)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(stats, expected_stats)
    strides = {
        "same": x.stride(),
        "contiguous": dense.stride(),
        "channels_last": dense.contiguous(memory_format=torch.channels_last).stride(),
    }
    assert y.stride() == strides[becomes]

    dy = torch.randn(dense.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    gradients = ops.backward(FORMATS[dy_format][0](dy), x, None, stats)
    assert gradients[0].stride() == y.stride()
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    for got, wanted in zip(gradients, ops.backward(dy, dense, None, expected_stats), strict=True):
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=1e-3)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ranks_of_equal_batches_compute_what_one_does(format_, dtype):
    """The mean of both batches is that of each, and so is everything else: in every format."""
    x = FORMATS[format_][0](DENSE.to(dtype))
    dy = torch.randn(DENSE.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted_y, wanted_stats = forward(x, weight=None, bias=None, running_mean=None, running_std=None)
    wanted = ops.backward(dy, x, None, wanted_stats)
    y, dx, dweight, dbias, stats, total = together(x, dy)
    assert y.stride() == wanted_y.stride() and dx.stride() == wanted[0].stride()
    assert total.tolist() == [2 * x.numel() / x.size(1), 2]
    for got, want in zip((y, dx, dweight, dbias), (wanted_y, *wanted), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(stats[0] + stats[1], wanted_stats[0] + wanted_stats[1])
    torch.testing.assert_close(stats[2:], wanted_stats[2:])


@pytest.mark.parametrize(
    "shape", [(7, 3), (6, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4), (2, 3, 2, 2, 2, 2)], ids=str
)
def test_channels_last_exists_for_every_number_of_dimensions(shape):
    """torch names the format for 4 and 5 dimensions only."""
    x = torch.randn(shape)
    order = [0, *range(2, x.dim()), 1]
    inverse = [0, x.dim() - 1, *range(1, x.dim() - 1)]
    last = x.permute(order).contiguous().permute(inverse)
    y, stats = forward(last, weight=None, bias=None)
    assert y.stride() == last.stride()
    expected, expected_stats = forward(x, weight=None, bias=None)
    torch.testing.assert_close(y, expected)
    dx, *_ = ops.backward(x, last, None, stats)
    assert dx.stride() == last.stride()
    expected_dx = ops.backward(x, x, None, expected_stats)[0]
    torch.testing.assert_close(dx, expected_dx, atol=1e-5, rtol=1e-4)

    wide = torch.cat([x, x], 1).permute(order).contiguous().permute(inverse)[:, :3]
    y, _ = forward(wide, weight=None, bias=None)
    assert y.stride() == (last if x.dim() > 2 else x).stride()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "shape", [(5, 1, 3, 4), (1, 5, 3, 4), (5, 3, 1, 1), (1, 1, 3, 4), (5, 1)], ids=str
)
def test_dimensions_of_one_do_not_matter(shape):
    x = torch.randn(shape)
    expected, _ = forward(x, weight=None, bias=None)
    sizes = list(zip(shape, x.stride(), strict=True))
    for strange in (7, 1, 1000):
        strides = [stride if size > 1 else strange for size, stride in sizes]
        y, _ = forward(x.as_strided(shape, strides), weight=None, bias=None)
        torch.testing.assert_close(y, expected)


def test_elements_off_their_natural_alignment():
    """DLPack and frombuffer can make such tensors."""
    values = torch.randn(4, 3, 5)
    data = bytearray(1) + bytearray(values.numpy().tobytes())
    x = torch.frombuffer(data, dtype=torch.float32, offset=1).view(4, 3, 5)
    assert x.data_ptr() % 4 != 0
    expected, _ = forward(values, weight=None, bias=None)
    torch.testing.assert_close(forward(x, weight=None, bias=None)[0], expected)


def test_weight_and_statistics_may_be_strided():
    x = torch.randn(6, 4, 5)
    weight, bias = torch.rand(8)[::2], torch.rand(1).expand(4)
    expected, stats = forward(x, weight=weight.contiguous(), bias=bias.contiguous())
    assert torch.equal(forward(x, weight=weight, bias=bias)[0], expected)
    strided = stats.t().contiguous().t()
    for got, wanted in zip(
        ops.backward(x, x, weight, strided),
        ops.backward(x, x, weight.contiguous(), stats),
        strict=True,
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)], ids=str)
def test_an_empty_batch_changes_nothing(shape):
    x = torch.empty(shape)
    state = dict(
        running_mean=torch.randn(3),
        running_std=torch.rand(3) + 1,
        num_batches_tracked=torch.tensor(7),
    )
    before = {key: tensor.clone() for key, tensor in state.items()}
    y, stats = forward(x, **state)
    assert y.shape == x.shape
    assert torch.equal(stats, torch.zeros(5, 3))
    for key, tensor in state.items():
        assert torch.equal(tensor, before[key])
    dx, dweight, dbias = ops.backward(x, x, None, stats)
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros(3)) and torch.equal(dbias, torch.zeros(3))
    assert ops.inference(x, None, None, *list(state.values())[:2]).shape == x.shape
    assert ops.renormalize(x, None, None, stats).shape == x.shape


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)], ids=str)
def test_an_empty_batch_has_an_empty_message(shape):
    x = torch.empty(shape)
    assert ops.moments(x, False).tolist() == [0.0] * 8
    assert ops.moments(x, True).tolist() == [0.0] * 7 + [1.0]
    y, dx, dweight, dbias, stats, total = together(x, x)
    assert y.shape == dx.shape == x.shape
    assert total.tolist() == [0, 2] and not stats.any() and not dweight.any() and not dbias.any()

    state = dict(
        running_mean=torch.randn(3),
        running_std=torch.rand(3) + 1,
        num_batches_tracked=torch.tensor(7),
    )
    before = {key: tensor.clone() for key, tensor in state.items()}
    merge(ops.moments(x, True).expand(2, -1), **state)
    for key, tensor in state.items():
        assert torch.equal(tensor, before[key])


def test_outputs_are_new_memory():
    x = torch.randn(4, 3, 5)
    y, stats = forward(x)
    inputs, outputs = {x.data_ptr()}, {y.data_ptr(), stats.data_ptr()}
    dx, dweight, dbias = ops.backward(x, x, None, stats)
    outputs |= {dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr()}
    assert len(outputs) == 5 and not inputs & outputs


OPERATORS = [
    "forward", "backward", "renormalize", "inference", "inference_backward",
    "moments", "merge", "backward_sums", "backward_project",
]  # fmt: skip


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_every_operator_is_registered_for_both_devices(op, key):
    """In a build without CUDA too, where the answer to a CUDA tensor is what to do about it."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"batchrenorm::{op}", key)


@pytest.mark.skipif(_C.build_info()["cuda"], reason="this build has CUDA kernels")
def test_a_cuda_tensor_in_a_cpu_build_says_what_to_do():
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    x, column = torch.randn(4, 3), torch.ones(3)
    with pytest.raises(
        RuntimeError, match="built without its CUDA kernels.*CUDA_HOME.*pip install"
    ):
        ops.inference.default.redispatch(cuda, x, None, None, column, column)
