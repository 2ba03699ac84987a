"""The emulator's worth: bugs that kernels of this kind really have, planted in copies of the
shipped sources, must be caught.

A bug is a textual patch. If the source has moved on so that a patch no longer applies, the test
fails: rewrite the patch. What cannot be planted here is a missing memory fence: x86 does not
reorder what a GPU would; and a slot beyond the tensor that is loaded and not used, which `make
asan` catches.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from simt import build

PROBE = build.REPOSITORY / "tests/simt/probe.py"


@dataclass(frozen=True)
class Bug:
    name: str
    file: str  # under csrc/
    old: str
    new: str
    kernel: str = "forward"
    says: str = "CAUGHT"  # in what the probe prints
    race: bool = False  # caught by ThreadSanitizer, in any order of events

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


BUGS = [
    Bug(
        "a bundle's first column counted to the channel before",
        "kernels/bundle.cuh",
        "(column == 0 ? second : 0)",
        "(column == 0 ? 0 : second)",
    ),
    Bug(
        "a bundle's first column counted to the channel before, backward",
        "kernels/bundle.cuh",
        "(column == 0 ? second : 0)",
        "(column == 0 ? 0 : second)",
        kernel="backward",
    ),
    Bug(
        "a bundle's records read before they are written",
        "kernels/bundle.cuh",
        "of_lanes(lanes, split, true);\n  __syncthreads();",
        "of_lanes(lanes, split, true);",
    ),
    Bug(
        "what a bundle's warps leave lies where others still read",
        "kernels/bundle.cuh",
        "records + kBundleRecords;",
        "records;",
    ),
    Bug(
        "a boundary of a bundle one lane late",
        "kernels/slab.cuh",
        "return first + (lane < split ? 0 : 1);",
        "return first + (lane <= split ? 0 : 1);",
        kernel="backward",
    ),
    Bug(
        "lanes behind a plane counted to it",
        "kernels/slab.cuh",
        "left < Slot::kLanes ? (1u << left) - 1 : kAll;",
        "left > 0 ? kAll : 0u;",
    ),
    Bug(
        "lanes in front of a plane counted to it, backward",
        "kernels/slab.cuh",
        "plane_left == slots ? here >> before << before : here;",
        "here;",
        kernel="backward",
    ),
    Bug(
        "lanes of a neighbour summed, backward",
        "kernels/unaligned.cuh",
        "slot.gx[0] += counts ? dy[i] * (x[i] - centre) : Real(0);",
        "slot.gx[0] += dy[i] * (x[i] - centre);",
        kernel="backward",
    ),
    Bug(
        "a slot stored over a neighbour's elements",
        "kernels/tile.cuh",
        "if (lanes != cover.kAll) {",
        "if (lanes == 0) {",
    ),
    Bug(
        "blocks of an unaligned team counted as if their slots were full",
        "kernels/moments.cuh",
        "sums.add(count, mean - first, m2);",
        "sums.add(r + 1 < plan.team ? each : last, mean - first, m2);",
    ),
    Bug(
        "a channel said to begin where its tensor's first does",
        "kernels/slab.cuh",
        "static_cast<int>(first % kLanes);",
        "static_cast<int>(first % 1u);",
    ),
    Bug(
        "moving statistics read after the team has met",
        "kernels/forward.cu",
        "const ChannelState<Real> state = states[own];",
        "const ChannelState<Real> state = channel_state<Real>(params, c);",
    ),
    Bug(
        "one set of partial results a team",
        "kernels/barrier.cuh",
        "(2 * std::int64_t{team} + parity)",
        "(2 * std::int64_t{team} + 0 * parity)",
    ),
    Bug(
        "one set of partial results a team, backward",
        "kernels/barrier.cuh",
        "(2 * std::int64_t{team} + parity)",
        "(2 * std::int64_t{team} + 0 * parity)",
        kernel="backward",
    ),
    Bug(
        "no barrier before records are read",
        "kernels/reduce.cuh",
        "  __syncthreads();\n\n  typename Values::Total total{};",
        "  typename Values::Total total{};",
    ),
    Bug(
        "no barrier before the affine maps are read",
        "kernels/forward.cu",
        "    __syncthreads();\n\n    Affine<Real> affine[kChannels];",
        "    Affine<Real> affine[kChannels];",
    ),
    Bug(
        "no barrier before the projections are read",
        "kernels/backward.cu",
        "    __syncthreads();\n\n    Projection<Real> projected[kChannels];",
        "    Projection<Real> projected[kChannels];",
        kernel="backward",
    ),
    Bug(
        "block arrives at the team barrier before all its threads have published",
        "kernels/barrier.cuh",
        "  constexpr unsigned kFlip = 0x80000000u;\n  __syncthreads();\n",
        "  constexpr unsigned kFlip = 0x80000000u;\n",
    ),
    Bug(
        "block leaves the team barrier without waiting for its first thread",
        "kernels/barrier.cuh",
        "__nanosleep(20);\n  }\n  __syncthreads();\n}",
        "__nanosleep(20);\n  }\n}",
    ),
    Bug(
        "team barrier waits for one block too many",
        "kernels/barrier.cuh",
        "kFlip - static_cast<unsigned>(team - 1)",
        "kFlip - static_cast<unsigned>(team)",
        says="deadlock, no block can go on",
    ),
    Bug(
        "team barrier waits for one block too few",
        "kernels/barrier.cuh",
        "kFlip - static_cast<unsigned>(team - 1)",
        "kFlip - static_cast<unsigned>(team - 2)",
    ),
    Bug(
        "a block of the team does not arrive",
        "kernels/barrier.cuh",
        "  if (threadIdx.x == 0)\n    old =",
        "  if (threadIdx.x == 0 && rank != 1)\n    old =",
        says="deadlock, no block can go on",
    ),
    Bug(
        "divergent barrier",
        "kernels/reduce.cuh",
        "  if (thread < channels) total = total_of(",
        "  if (thread < channels) __syncthreads();\n  if (thread < channels) total = total_of(",
        says="divergent barrier",
    ),
    Bug(
        "blocks take the team's moments about means of their own",
        "kernels/moments.cuh",
        "mean - first, m2);",
        "mean - mine.mean, m2);",
    ),
    Bug(
        "the last block's share taken for a full one",
        "kernels/moments.cuh",
        "r + 1 < plan.team ? each : last",
        "r + 1 <= plan.team ? each : last",
    ),
    Bug(
        "a mean about a thread's first record taken for one about the team's",
        "kernels/reduce.cuh",
        "all.mean[0] = centre_ + further;",
        "all.mean[0] = further;",
    ),
    Bug(
        "a slot that does not exist is a zero among the values",
        "kernels/moments.cuh",
        "chosen(exists, tile[v], tile[0])",
        "tile[v]",
    ),
    Bug(
        "the last group of records is left out",
        "kernels/reduce.cuh",
        "    if (g < count) m = records",
        "    if (g + 1 < count) m = records",
    ),
    Bug(
        "a round's moments in place of those before it",
        "kernels/forward.cu",
        "      if (round == 0) {\n        moments = more;",
        "      if (round >= 0) {\n        moments = more;",
    ),
    Bug(
        "pivots of the first lane alone",
        "kernels/pivot.cuh",
        "pivot[k] += __shfl_xor_sync(kAllLanes, pivot[k], distance);",
        "pivot[k] = __shfl_xor_sync(kAllLanes, pivot[k], distance);",
    ),
    Bug(
        "part of a block leaves before the barrier",
        "kernels/forward.cu",
        "    __syncthreads();\n\n    Affine<Real> affine[kChannels];",
        "    if (finishes) __syncthreads();\n\n    Affine<Real> affine[kChannels];",
    ),
    Bug(
        "partial results are read from the first ones' place again",
        "kernels/barrier.cuh",
        "rank += kAhead * step, pair += kAhead * plan.threads)",
        "rank += kAhead * step)",
    ),
    Bug(
        "partial results beyond those on their way are left out",
        "kernels/barrier.cuh",
        "rank += kAhead * step, pair += kAhead * plan.threads)",
        "rank = plan.team)",
        kernel="backward",
    ),
    Bug(
        "scales of a stripe's first channels for all of it",
        "kernels/affine_rows.cuh",
        "Wide::unpack(Wide::load_shared(rows_[1] + channel + k), scale);",
        "Wide::unpack(Wide::load_shared(rows_[1] + k), scale);",
    ),
    Bug(
        "late partial result",
        "kernels/moments.cuh",
        "plan.team, walk.rank(), meanwhile);\n",
        "plan.team, walk.rank(), meanwhile);\n"
        "  if (thread < channels) partials.publish(walk.rank(), thread, mine.mean, mine.m2);\n",
        # The early one goes, see below.
    ),
    Bug(
        "unmasked store",
        "kernels/forward.cu",
        "if (v < slots) store_slot",
        "if (slots > 0) store_slot",
    ),
    Bug(
        "store beyond the last channel",
        "kernels/slab.cuh",
        "column() * kLanes < there",
        "column() * kLanes <= there",
    ),
    Bug(
        "shuffle over half a warp",
        "kernels/reduce.cuh",
        "constexpr unsigned kAllLanes = 0xffffffffu;",
        "constexpr unsigned kAllLanes = 0x0000ffffu;",
        says="of a part of the warp",
    ),
    Bug(
        "reduction over half a warp",
        "kernels/reduce.cuh",
        "for (int distance = kWarp / 2;",
        "for (int distance = kWarp / 4;",
    ),
    Bug(
        "mean of squares minus square of the mean",
        "kernels/moments.cuh",
        "const Real delta = x[i] - centre[0];",
        "const Real delta = x[i] - Real(0) * centre[0];",
    ),
    Bug(
        "unbiased variance",
        "core/math.h",
        "std::sqrt(m.m2 / m.count + epsilon)",
        "std::sqrt(m.m2 / (m.count - Real(1)) + epsilon)",
    ),
    Bug(
        "counter moved before every block has read it",
        "kernels/forward.cu",
        "unsigned ticket = 0;",
        "unsigned ticket = 0;\n    if (asks && blockIdx.x == 0) *params.num_batches_tracked += 1;",
    ),
    Bug(
        "a block asks for its ticket with every slab",
        "kernels/forward.cu",
        "counts && thread == 0 && slab + plan.teams >= plan.slabs;",
        "counts && thread == 0;",
    ),
    Bug(
        "limits of a step that no block has looked up",
        "kernels/forward.cu",
        "if (slab < plan.teams && thread == last && step.follows_counter)",
        "if (slab >= plan.teams && thread == last && step.follows_counter)",
    ),
    Bug(
        "ticket does not wrap",
        "kernels/barrier.cuh",
        "return atomicInc(ticket_word(w), static_cast<unsigned>(last));",
        "return atomicInc(ticket_word(w), static_cast<unsigned>(last) + 1);",
        says="control words",
    ),
    Bug(
        "barrier polled without acquire",
        "kernels/barrier.cuh",
        "__atomic_load_n(p, __ATOMIC_ACQUIRE)",
        "__atomic_load_n(p, __ATOMIC_RELAXED)",
        says="ThreadSanitizer: data race",
        race=True,
    ),
    Bug(
        "arrival without release",
        "kernels/barrier.cuh",
        "return atomicAdd(p, value);",
        "return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);",
        kernel="backward",
        says="ThreadSanitizer: data race",
        race=True,
    ),
    Bug(
        "ticket without acquire and release",
        "kernels/barrier.cuh",
        "return atomicInc(ticket_word(w), static_cast<unsigned>(last));",
        "const unsigned old = __atomic_fetch_add(ticket_word(w), 1u, __ATOMIC_RELAXED);\n"
        "  if (static_cast<int>(old) == last)\n"
        "    __atomic_store_n(ticket_word(w), 0u, __ATOMIC_RELAXED);\n"
        "  return old;",
        says="ThreadSanitizer: data race",
        race=True,
    ),
    Bug(
        "two threads write one record",
        "kernels/reduce.cuh",
        "  __syncthreads();\n\n  typename Values::Total total{};",
        "  if (member == 0) records[0] = values.get(0);\n"
        "  __syncthreads();\n\n  typename Values::Total total{};",
        kernel="backward",
        says="ThreadSanitizer: data race",
        race=True,
    ),
    Bug(
        "copies are not waited for",
        "kernels/prefetch.cuh",
        "      wait_for_copies();\n",
        "",
    ),
    Bug(
        "copies are waited for by one warp only",
        "kernels/prefetch.cuh",
        "      wait_for_copies();\n",
        "      if (threadIdx.x < kWarp) wait_for_copies();\n",
        kernel="backward",
    ),
    Bug(
        "copies go to where the last ones have still to be read",
        "kernels/forward.cu",
        "        Next::take(slots, tile);\n",
        "        wait_for_copies();\n"
        "        if (slab + plan.teams < plan.slabs)\n"
        "          Next::fetch(p, (slab + plan.teams) * channels, walk, x);\n"
        "        Next::take(slots, tile);\n",
    ),
    Bug(
        "copies of the next slab but one",
        "kernels/forward.cu",
        "const int next0 = (slab + plan.teams) * channels;",
        "const int next0 = (slab + 2 * plan.teams) * channels;",
    ),
    Bug(
        "copies of another team's slab",
        "kernels/backward.cu",
        "const int next0 = (slab + plan.teams) * channels;",
        "const int next0 = (slab + 1) * channels;",
        kernel="backward",
    ),
    Bug(
        "copies beyond the last slab",
        "kernels/forward.cu",
        "|| slab + plan.teams >= plan.slabs) return;",
        ") return;",
        says="a thread ends before its asynchronous copies",
    ),
    Bug(
        "no zeros at the ragged end",
        "kernels/prefetch.cuh",
        "v < slots ? Slot::load_shared(place(tensor, v)) : Slot::zero()",
        "v < slots || v < kSlots ? Slot::load_shared(place(tensor, v)) : Slot::zero()",
        kernel="backward",
    ),
    Bug(
        "two tensors in one place",
        "kernels/prefetch.cuh",
        "(tensor * kSlots + v)",
        "(tensor * 0 + v)",
        kernel="backward",
        says="two asynchronous copies to one place",
    ),
    Bug(
        "slots of two threads in one place",
        "kernels/shared.cuh",
        "static_cast<int>(threadIdx.x)) * kBytes",
        "static_cast<int>(threadIdx.x % kWarp)) * kBytes",
        kernel="backward",
    ),
    Bug(
        "the first slab too is taken from shared memory",
        "kernels/forward.cu",
        "plan.prefetch && slab >= plan.teams",
        "plan.prefetch != 0",
    ),
    Bug(
        "more shared memory than the kernel is allowed",
        "kernels/launch.cuh",
        "if (bytes <= most) return cudaSuccess;",
        "if (bytes > most) return cudaSuccess;",
        says="error 1",
    ),
    Bug(
        "a kernel that is allowed some shared memory is not allowed more",
        "kernels/launch.cuh",
        "if (bytes <= most) return cudaSuccess;",
        "if (most > 0) return cudaSuccess;",
        says="error 1",
    ),
    Bug(
        "less shared memory than the rounds take",
        "core/geometry.h",
        "plan.retained * retained_round_bytes(plan, pass)",
        "plan.retained * retained_round_bytes(plan, pass) / 2",
        kernel="backward",
        says="beyond the block's dynamic shared memory",
    ),
    Bug(
        "a round too many is retained",
        "core/geometry.h",
        "place < retained;",
        "place <= retained;",
        says="beyond the block's dynamic shared memory",
    ),
    Bug(
        "two tensors of a retained round in one place",
        "kernels/retain.cuh",
        "(place * kTensors + tensor)",
        "(place * kTensors + 0 * tensor)",
        kernel="backward",
    ),
    Bug(
        "two retained rounds in one place",
        "kernels/retain.cuh",
        "(place * kTensors + tensor)",
        "(0 * place * kTensors + tensor)",
    ),
    Bug(
        "another round is read back",
        "kernels/backward.cu",
        "Kept::take(plan.retained_place(round), ",
        "Kept::take(plan.retained - 1 - plan.retained_place(round), ",
        kernel="backward",
    ),
    Bug(
        "the ragged round is read back and was not stored",
        "kernels/forward.cu",
        "if (retained) Kept",
        "if (retained && round > 0) Kept",
    ),
    Bug(
        "a round is stored before it is loaded",
        "kernels/backward.cu",
        "      const int slots = walk.in_range(there) ? walk.slots(piece) : 0;\n"
        "      Cursor cursor = walk.begin(p, channel0, piece);\n"
        "      const bool retained = plan.retains(round);\n",
        "      const int slots = walk.in_range(there) ? walk.slots(piece) : 0;\n"
        "      Cursor cursor = walk.begin(p, channel0, piece);\n"
        "      const bool retained = plan.retains(round);\n"
        "      if (retained && round > 0)\n"
        "        Kept::keep(plan.retained_place(round), x_tile, dy_tile);\n",
        kernel="backward",
    ),
    Bug(
        "what a full block's threads would have stored",
        "kernels/retain.cuh",
        "tiles[v] = Slot::load_shared(at(place, tensor++, v))",
        "tiles[v] = Slot::load_shared(at(place, tensor++, v) + 64 * Slot::kBytes)",
    ),
    Bug(
        "plane boundary not crossed",
        "kernels/slab.cuh",
        "return stride_.leap;",
        "return stride_.step;",
    ),
    Bug(
        "what stays in registers taken for the ragged piece",
        "kernels/forward.cu",
        "const int piece = walk.piece(round);",
        "const int piece = round;",
    ),
    Bug(
        "slope without the inverse std",
        "core/math.h",
        "sums.gx / count * s.inv_std * s.inv_std",
        "sums.gx / count * s.inv_std",
        kernel="backward",
    ),
    Bug(
        "weight gradient without d",
        "core/math.h",
        "s.r * (sums.gx * s.inv_std) + s.d * sums.g",
        "s.r * (sums.gx * s.inv_std)",
        kernel="backward",
    ),
    Bug(
        "ranks of unequal shares weigh the same",
        "core/ranks.h",
        "Moments<double>{message[2 * channels], message[c]",
        "Moments<double>{1.0, message[c]",
        kernel="merge",
    ),
    Bug(
        "messages read one place off",
        "core/ranks.h",
        "constexpr std::int64_t message_length(std::int64_t channels) { return 2 * channels + 2; }",
        "constexpr std::int64_t message_length(std::int64_t channels) { return 2 * channels + 1; }",
        kernel="merge",
    ),
    Bug(
        "threads do not wait for the step",
        "kernels/merge.cu",
        "    nonfinite = 0;\n  }\n  __syncthreads();\n",
        "    nonfinite = 0;\n  }\n",
        kernel="merge",
    ),
    Bug(
        "threads move averages before all have looked for a NaN",
        "kernels/merge.cu",
        "atomicOr(&nonfinite, 1u);\n    }\n    __syncthreads();\n",
        "atomicOr(&nonfinite, 1u);\n    }\n",
        kernel="merge",
    ),
    Bug(
        "a skipped batch is counted",
        "kernels/merge.cu",
        "params.num_batches_tracked && moves)",
        "params.num_batches_tracked && any)",
        kernel="merge",
    ),
    Bug(
        "every thread reads the counter that one moves",
        "kernels/merge.cu",
        "running, step.limits);",
        "running, limits_of<Real>(params, step_count(params)));",
        kernel="merge",
        says="ThreadSanitizer: data race",
        race=True,
    ),
]

# Further edits that a bug needs.
ALSO = {
    "a round is stored before it is loaded": (
        "kernels/backward.cu",
        "      if (retained) Kept::keep",
        "      if (retained && round == 0) Kept::keep",
    ),
    "late partial result": (
        "kernels/moments.cuh",
        "  if (thread < channels) partials.publish(walk.rank(), thread, mine.mean, mine.m2);\n"
        "  team_barrier(",
        "  team_barrier(",
    ),
    "mean of squares minus square of the mean": (
        "kernels/moments.cuh",
        "(centre[k] - pivot[k]) + mean",
        "((kFirstAgain ? centre[k] : Real(0)) - pivot[k]) + mean",
    ),
    "counter moved before every block has read it": (
        "kernels/forward.cu",
        "*params.num_batches_tracked = step_count(params) + 1;",
        "(void)ticket;",
    ),
}


def replace_once(root: Path, file: str, old: str, new: str) -> None:
    path = root / "csrc" / file
    text = path.read_text()
    count = text.count(old)
    if count != 1:
        raise AssertionError(
            f"the patch of {file} applies {count} times instead of once: rewrite it\n{old}"
        )
    path.write_text(text.replace(old, new))


# Variants that the probe takes; the others are two thirds of the time to compile.
PROBED = ("<float, kLayout>", "<float, Layout::kBundles", "<__half, Layout::kUnaligned")


def without_other_variants(root: Path) -> None:
    path = root / "csrc/kernels/launch.cuh"
    case = re.compile(r"(case DType::k\w+:) (return .*<[\w:]+, (?:kLayout|Layout::)[^;]*;)")

    def kept(match: re.Match) -> str:
        return match[0] if any(name in match[2] for name in PROBED) else f"{match[1]} break;"

    text, count = case.subn(kept, path.read_text())
    assert count == 9, "launch.cuh has moved on: its variants are found no more"
    path.write_text(text)


def plant(bug: Bug | None, root: Path) -> None:
    for part in ("csrc/core", "csrc/kernels", "tests/simt"):
        shutil.copytree(build.REPOSITORY / part, root / part)
    without_other_variants(root)
    if bug is None:
        return
    if bug.name in ALSO:
        replace_once(root, *ALSO[bug.name])
    replace_once(root, bug.file, bug.old, bug.new)


def probe(
    bug: Bug | None, kernel: str, root: Path, race: bool = False
) -> subprocess.CompletedProcess:
    """Builds the kernel of a patched copy and runs the probe on it.

    The emulator's own objects come from the cache.
    """
    plant(bug, root)
    sources = (f"csrc/kernels/{kernel}.cu", "tests/simt/entry.cpp")
    library = build.library(root, races=race, sources=sources, jobs=1)
    command = [sys.executable, str(PROBE), str(library), kernel]
    environment = dict(os.environ)
    if race:
        command.append("--one-schedule")
        environment["LD_PRELOAD"] = build.preloaded("libtsan.so")
        environment["TSAN_OPTIONS"] = "halt_on_error=1:exitcode=66"
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    except subprocess.TimeoutExpired:
        if bug is None:
            raise
        # Like a crash, nobody overlooks it. The shipped kernels take 1 to 10 s.
        return subprocess.CompletedProcess(command, -signal.SIGKILL, "", "did not end")
    finally:
        if bug is not None:
            library.unlink()


@pytest.mark.parametrize("race", [False, True], ids=["orders", "races"])
@pytest.mark.parametrize("kernel", ["forward", "backward", "merge"])
def test_the_shipped_kernels_pass_the_probe(kernel: str, race: bool, tmp_path: Path):
    done = probe(None, kernel, tmp_path, race)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_caught(bug: Bug, tmp_path: Path):
    done = probe(bug, bug.kernel, tmp_path, bug.race)
    said = done.stdout + done.stderr
    assert done.returncode != 0, "the bug went unnoticed"
    # A wild read or write may end the process or catch it in a loop, which is noticing it too.
    crashed = done.returncode < 0
    assert crashed or bug.says in said, said
    print(said[:1000].strip() or f"signal {-done.returncode}")
