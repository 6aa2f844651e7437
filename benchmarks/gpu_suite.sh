#!/usr/bin/env bash
# Everything that needs a GPU, in one go within 10 minutes, without a network: the GPU tests (CPU/GPU parity among them), every
# stage, the training's options one by one, the sweeps and a soak. Results go to $OUT (default benchmarks/results).
#
#   OUT=results benchmarks/gpu_suite.sh          PYTHON=python3 by default; BUDGET=600 seconds in all
#
# Without CUDA the parts that need it skip themselves, and the rest runs on the CPU with short windows, as a rehearsal.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results} PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-600}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-${TMPDIR:-/tmp}/simsiam_dali_cache} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT/logs" "$OUT/embed"
CORES=$(nproc)
# By name: the other files may import what a GPU host does not have, such as MLflow.
GPU_TESTS=(tests/test_embed.py tests/test_loader.py tests/test_pipeline.py tests/test_simple.py)
LEAST=30 # seconds in which no part can do anything
started=$SECONDS failed=0

left() { echo $((BUDGET - SECONDS + started)); }

# part NAME SECONDS COMMAND...: run it for at most that long and within the budget, or skip it when too little is left.
part() {
  local name=$1 limit=$2
  shift 2
  if [ "$(left)" -lt "$LEAST" ]; then
    echo "== $name: skipped, $(left) s of $BUDGET are left"
    return
  fi
  if [ "$limit" -gt "$(left)" ]; then limit=$(left); fi
  echo "== $name"
  local began=$SECONDS
  if timeout --kill-after=10 "$limit" "$@" >"$OUT/logs/$name.log" 2>&1; then
    tail -n 25 "$OUT/logs/$name.log"
    echo "== $name: done in $((SECONDS - began)) s"
  else
    echo "== $name: FAILED with status $? after $((SECONDS - began)) s"
    tail -n 25 "$OUT/logs/$name.log"
    failed=1
  fi
}

bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" benchmarks/throughput.py --json "$OUT/$name.json" --plot "$OUT/$name.png" "$@"
}

skip() { echo "== $1: skipped, no CUDA device"; }

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  part gpu-tests 120 "$PYTHON" -m pytest -q -m gpu "${GPU_TESTS[@]}"
  bench gpu 300 --threads "$CORES" --workers "$CORES" --seconds 1
  # The training's options one by one, each against the run above: what does each of them give?
  for option in train.compile=true train.channels_last=false train.precision=fp32; do
    bench "gpu-${option//[.=]/-}" 90 --stages model train --set "$option" --threads "$CORES" --seconds 1
  done
  bench gpu-baseline-train 60 --stages baseline/train --threads "$CORES" --workers "$CORES" --seconds 1
  for sweep in threads batch; do
    bench "gpu-sweep-$sweep" 90 --sweep "$sweep" --stages loader/all --threads "$CORES" --seconds 0.5
  done
  for sweep in seconds rate codec; do
    bench "gpu-sweep-$sweep" 90 --sweep "$sweep" --stages loader/card --threads "$CORES" --seconds 0.5
  done
  part gpu-embed 60 "$PYTHON" benchmarks/embed.py --seconds 1 --json "$OUT/embed/gpu.json"
  bench gpu-soak 60 --soak 1000 --threads "$CORES"
else
  skip gpu-tests
  skip gpu
  for option in compile channels_last precision; do skip "gpu-train-$option"; done
  skip gpu-baseline-train
  skip gpu-embed
  bench rehearsal 400 --stages loader/card model train --seconds 0.2
  for sweep in threads batch seconds rate codec; do
    bench "rehearsal-sweep-$sweep" 400 --sweep "$sweep" --stages loader/card --seconds 0.2 --view-seconds 10
  done
  bench rehearsal-soak 400 --soak 20 --view-seconds 10 --batch-size 4
fi
echo "== all in $((SECONDS - started)) s, results in $OUT"
exit $failed
