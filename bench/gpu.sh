#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can say, in one run of under eight minutes and
# without a network: build, doctor, parity, GPU tests, sanitizers, the benchmark suites with the
# acceptance table, DRAM bytes, properties of the chip, a sweep of launch plans.
#
#   bench/gpu.sh [OUT]        OUT: where reports go, default bench/results/gpu
#
#   PYTHON=python3            an interpreter with torch for CUDA; setuptools and ninja to build with
#   WHEELS=DIR                wheels of what that interpreter lacks (setuptools, pytest, ...)
#   ONLY=REGEX                the steps whose names match, for a second run; on a machine that the
#                             first one has not built on, '^(wheels|build|benchmark)$'
#   SECONDS_IN_ALL=460        after which no step is started and running ones are ended
#
# Every step has a time limit of its own, and the next one runs whether or not it passed. Reports
# are written as they come: summary.txt says what ran, what passed and where to look.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OUT=${1:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
DEADLINE=${SECONDS_IN_ALL:-460}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
rm -f "$OUT"/{summary.txt,build.log,parity.log,tests.log,sanitizer.log,bench.log,chip.log,results.json}
export PYTHONUNBUFFERED=1
# Where the toolkit and its profiler lie if nobody has said so.
for tools in /usr/local/cuda/bin /opt/nvidia/nsight-compute/*/; do
  [ -d "$tools" ] && PATH=$PATH:${tools%/}
done
SECONDS=0

say() {
  printf '%s\n' "$*" | tee -a "$OUT/summary.txt"
}

# step NAME LIMIT LOG COMMAND...
step() {
  local name=$1 limit=$2 log=$3 began=$SECONDS left=$((DEADLINE - SECONDS)) status
  shift 3
  [[ -z ${ONLY:-} || $name =~ $ONLY ]] || return 1
  if ((left < 5)); then
    say "$(printf '%-28s not run: out of time' "$name")"
    touch "$WORK/failed"
    return 1
  fi
  ((limit > left)) && limit=$left
  printf '\n$ %s\n' "$*" >>"$log"
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  local took=$((SECONDS - began)) verdict="failed, exit status $status"
  ((status == 0)) && verdict=passed
  ((status == 124 || status == 137)) && verdict="ended at its limit of $limit s"
  ((status == 0)) || touch "$WORK/failed"
  say "$(printf '%-28s %s (%d s, %s)' "$name" "$verdict" "$took" "$(basename "$log")")"
  return $status
}

has() {
  command -v "$1" >/dev/null 2>&1 || {
    say "$(printf '%-28s not run: no %s on this machine' "$2" "$1")"
    return 1
  }
}

say "$(date -u '+%Y-%m-%d %H:%M:%S UTC'), commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"
if has nvidia-smi "chip"; then
  say "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader)"
fi

# --- build -------------------------------------------------------------------------------------

if [ -n "${WHEELS:-}" ]; then
  step "wheels" 60 "$OUT/build.log" "$PYTHON" -m pip install -q --no-index --no-deps --no-compile \
    --target "$WORK/site" "$WHEELS"/*.whl
  export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH} PATH=$WORK/site/bin:$PATH
fi
export BATCHRENORM_CUDA=1
step "build" 150 "$OUT/build.log" "$PYTHON" setup.py build_ext --inplace
step "doctor" 40 "$OUT/build.log" "$PYTHON" -m batchrenorm_cuda doctor

# Compiled beside the checks; run after them, alone.
if has nvcc "chip programs"; then
  (
    step "compile probe" 100 "$OUT/build.log" nvcc -O3 -std=c++17 -arch=native bench/probe.cu \
      -o "$WORK/probe"
    # The kernels as the build has made them, if it has: to compile them again takes 80 s.
    kernels=()
    for kernel in forward backward; do
      made=(build/*/csrc/kernels/$kernel.cu.o)
      [ -f "${made[0]}" ] && kernels+=("${made[0]}") || kernels+=("csrc/kernels/$kernel.cu")
    done
    step "compile sweep" 150 "$OUT/build.log" nvcc -O3 -std=c++17 -arch=native bench/sweep.cu \
      "${kernels[@]}" -o "$WORK/sweep"
  ) &
fi

# --- checks: nothing here is timed, so they share the GPU ----------------------------------------

export OMP_NUM_THREADS=2  # ten processes at a time

step "parity, quick" 60 "$OUT/parity.log" "$PYTHON" -m batchrenorm_cuda parity --device cuda --quick

sanitize() {
  # The caching allocator would hide an access past the end of a tensor.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" 110 "$WORK/$1.log" compute-sanitizer --tool "$@" \
    --error-exitcode 9 "${FILTER[@]}" "$PYTHON" -m bench.small
}
FILTER=()
if has compute-sanitizer "sanitizers"; then
  # Only this package's kernels, where the tool can choose: torch's own fill the tensors.
  compute-sanitizer --help 2>/dev/null | grep -q -- '--kernel-name' && FILTER=(--kernel-name kns=brn)
  # Instrumented kernels take more registers: a cooperative launch may be refused as too large,
  # which the binding answers with a smaller one, and memcheck would report as an error.
  sanitize memcheck --report-api-errors no &
  sanitize racecheck &
  sanitize synccheck &
fi
step "parity, all" 120 "$OUT/parity.log" "$PYTHON" -m batchrenorm_cuda parity --device cuda &
if "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
  # A run that is killed prints verdicts, but no reasons. So where it can, pytest ends before its
  # limit by itself, and a test that hangs in a kernel takes only its own worker with it.
  OPTIONS=(-v --tb=short -rfE --continue-on-collection-errors -p no:cacheprovider)
  known=$("$PYTHON" -m pytest --noconftest --help 2>/dev/null)
  [[ $known == *worksteal* ]] && OPTIONS+=(-n 6 --dist worksteal)
  [[ $known == *--session-timeout* ]] &&
    OPTIONS+=(--session-timeout=100 --timeout=60 --timeout-method=thread)
  BATCHRENORM_REQUIRE_GPU=1 step "GPU tests" 120 "$OUT/tests.log" "$PYTHON" -m pytest -m gpu \
    "${OPTIONS[@]}" tests --deselect tests/test_parity.py::test_everything_passes_on_cuda &
else
  say "$(printf '%-28s not run: no pytest or no hypothesis' "GPU tests")"
fi
wait
cat "$WORK"/*check.log >"$OUT/sanitizer.log" 2>/dev/null || rm -f "$OUT/sanitizer.log"

# --- measurements: one at a time -----------------------------------------------------------------

unset OMP_NUM_THREADS
# Imports, roofs, the comparison under way at the end and the tables after it come on top.
rows=$((DEADLINE - SECONDS - 45))
rows=$((rows > 125 ? 125 : rows < 1 ? 1 : rows))
nvidia-smi --query-gpu=clocks.sm,clocks.mem,clocks_event_reasons.active --format=csv,noheader \
  -lms 500 >"$WORK/clocks" 2>/dev/null &
clocks=$!
step "benchmark" 170 "$OUT/bench.log" "$PYTHON" -m bench.run --device cuda --seconds "$rows" \
  --suite resnet50,rl,resnet50-large,segmentation,3d --providers batchrenorm,F.batch_norm \
  --json "$OUT/results.json"
kill "$clocks" 2>/dev/null
{ printf '\nclocks meanwhile, samples each\n'; sort "$WORK/clocks" | uniq -c; } >>"$OUT/chip.log"
[ -x "$WORK/probe" ] && step "properties of the chip" 40 "$OUT/chip.log" "$WORK/probe"
if has ncu "DRAM bytes"; then
  # By default ncu locks the clocks, which are not this script's to set.
  step "DRAM bytes" 70 "$OUT/chip.log" ncu --profile-from-start off --clock-control none --csv \
    --page raw --print-units base --log-file "$WORK/ncu.csv" \
    --metrics dram__bytes_read.sum,dram__bytes_write.sum "$PYTHON" -m bench.dram work
  cat "$WORK/ncu.csv" >>"$OUT/chip.log" 2>/dev/null
  step "DRAM bytes, read" 20 "$OUT/chip.log" "$PYTHON" -m bench.dram read "$WORK/ncu.csv" \
    --into "$OUT/results.json"
fi
if [ -x "$WORK/sweep" ]; then
  seconds=$((DEADLINE - SECONDS - 15))
  seconds=$((seconds > 55 ? 55 : seconds < 1 ? 1 : seconds))
  step "sweep of plans" 75 "$OUT/chip.log" "$WORK/sweep" "$seconds"
  grep -E '^(prefetch|retention): [0-9]' "$OUT/chip.log" | tee -a "$OUT/summary.txt"
fi

if [ -f "$OUT/results.json" ]; then
  "$PYTHON" -m bench.acceptance "$OUT/results.json" | tee -a "$OUT/summary.txt"
fi
say "$SECONDS s in all"
[ ! -e "$WORK/failed" ]
