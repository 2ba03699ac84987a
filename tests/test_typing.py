"""What a type checker makes of a user's program. The package says that it is typed (py.typed), so a
layer's attributes must not be `Tensor | Module`, which is all that nn.Module says of them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEADER = """
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import DataLoader
from typing_extensions import assert_type

import batchrenorm_cuda as br
from batchrenorm_cuda import adopt, reference
"""

# Of BatchNorm and of the layer that takes its place.
ALIKE = """
def {name}(norm: {cls}) -> Tensor:
    assert_type(norm.weight, {parameter})
    assert_type(norm.bias, {parameter})
    assert_type(norm.running_mean, Tensor | None)
    assert_type(norm.num_batches_tracked, Tensor | None)
    assert_type(norm.num_features, int)
    assert_type(norm.eps, float)
    assert_type(norm.momentum, float | None)
    assert_type(norm.affine, bool)
    assert_type(norm.track_running_stats, bool)
    nn.init.zeros_(norm.weight)
    norm.reset_running_stats()
    y: Tensor = norm(torch.ones(2, norm.num_features, 4, 4))
    return y
"""

PAIRS = {
    "nn.BatchNorm1d": "br.BatchRenorm1d",
    "nn.BatchNorm2d": "br.BatchRenorm2d",
    "nn.BatchNorm3d": "br.BatchRenorm3d",
    "nn.SyncBatchNorm": "br.SyncBatchRenorm",
    "nn.LazyBatchNorm2d": "br.LazyBatchRenorm2d",
}

OURS = """
class Net(nn.Module):
    def __init__(self, norm: type[nn.BatchNorm2d] | type[br.BatchRenorm2d]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = norm(8)


def main(loader: DataLoader[Tensor], optimiser: torch.optim.Optimizer) -> None:
    schedule = br.RenormSchedule(warmup_steps=500, r_max_step=4000, d_max_step=2500)
    net = br.convert(Net(nn.BatchNorm2d), schedule=schedule, momentum="keep", report=print)
    assert_type(net, Net)
    assert_type(br.convert_sync(net, skip="norm"), Net)
    br.set_schedule(net, schedule, from_now=True)
    br.set_limits(net, 1, 0)
    with br.monitor_clipping(net) as monitor:
        for x in loader:
            net(x).square().mean().backward()
            optimiser.step()
        assert_type(monitor.read(), dict[str, br.Clipping])
    br.update_stats(net, loader, device="cpu")
    br.freeze_statistics(net)
    assert_type(br.fold(net.eval()), Net)

    norm = br.BatchRenorm2d(8, momentum=None, bias=False, schedule=schedule, skip_nonfinite=True)
    assert_type(norm.running_std, Tensor | None)
    assert_type(norm.running_var, Tensor | None)
    assert_type(norm.schedule, Tensor | None)
    assert_type(norm.statistics_frozen, bool)
    assert_type(br.fuse_conv_batch_renorm_eval(net.conv, norm), nn.Conv2d)
    assert_type(norm.read_limits(), tuple[float, float])
    norm.monitor_clipping()
    assert_type(norm.read_clipping().r_clipped, float)
    norm.load_state_dict(adopt.from_ludvb(norm.state_dict()))

    x = torch.ones(2, 3)
    assert_type(br.batch_renorm(x, None, None, training=True), Tensor)
    assert_type(reference.batch_renorm(x, None, None, training=True), Tensor)


def mistakes(net: nn.Module) -> None:  # under --strict a comment that hides no error is an error
    br.BatchRenorm2d("8")  # type: ignore[arg-type]
    br.BatchRenorm2d(8, schedule=(1, 3))  # type: ignore[arg-type]
    br.BatchRenorm2d(8, r_max=3.0)  # type: ignore[call-arg]
    br.convert(net, momentum="same")  # type: ignore[arg-type]
    br.BatchRenorm2d(8).running_mean.zero_()  # type: ignore[union-attr]
    br.batch_renorm(torch.ones(2, 3))  # type: ignore[call-arg]
"""


def test_a_users_program_type_checks(tmp_path):
    program = tmp_path / "program.py"
    layers = [cls for pair in PAIRS.items() for cls in pair]
    functions = [
        ALIKE.format(
            name=cls.split(".")[1],
            cls=cls,
            parameter="UninitializedParameter" if "Lazy" in cls else "nn.Parameter",
        )
        for cls in layers
    ]
    program.write_text(HEADER + "".join(functions) + OURS)
    # Not this project's configuration, and of the modules imported only what they say to others.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--follow-imports=silent",
         "--cache-dir", str(ROOT / "build" / "mypy" / "program"), str(program)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
