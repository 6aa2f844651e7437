#!/usr/bin/env bash
# Everything that needs a GPU, in four parts, each within one command of 9 minutes, without a network:
#
#   a  the GPU tests: CPU/GPU parity, checkpoints, embedding
#   b  a real run: auto tuning, validation, SIGKILL, resume with a profile, embedding (killed_run.py)
#   c  every stage at the training's batch, the step under torch's sync debug mode, memory by batch size (gpu_step.py)
#   d  baselines, the training's options one by one, the CPU graph on the same cores, sweeps, a soak
#
#   OUT=results ONLY=a benchmarks/gpu_suite.sh          one part; the next command takes the next
#   OUT=results ONLY="b compile" benchmarks/gpu_suite.sh    a part, and one step of another by its name
#
#   OUT      where results go: PART.tar.gz, logs and JSON, written again after each step (default benchmarks/results/gpu)
#   ONLY     parts or steps (default: all)
#   BUDGET   seconds for all of it (default 540); steps for which nothing is left are listed at the end
#   SHARDS   packed music for part b (default: composed songs)
#   PYTHON   interpreter (default python3)
#   QUICK=1  the smallest settings everywhere, as a rehearsal; always so without CUDA
#
# Without CUDA what needs it is listed as skipped, and the rest runs on the CPU. Ends with 0 when everything that could run
# ran well, with 1 when something failed, with 2 for a word in ONLY that it does not know, and with 3 when the time was up
# before everything had begun. MLflow is not needed.
set -uo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD
OUT=${OUT:-benchmarks/results/gpu} PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-540} ONLY=${ONLY:-a b c d} SHARDS=${SHARDS:-}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-${TMPDIR:-/tmp}/simsiam_dali_cache} PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
# By name: the other files may import what a GPU host does not have, such as MLflow.
GPU_TESTS=(tests/test_embed.py tests/test_loader.py tests/test_pipeline.py tests/test_quarantine.py tests/test_simple.py)
known=" a b c d $(sed -nE 's/^(bench )?(step|cuda) [a-d] ([a-z0-9-]+) .*/\3/p' benchmarks/gpu_suite.sh | tr '\n' ' ')"
for word in $ONLY; do
  if [[ "$known" != *" $word "* ]]; then
    echo "ONLY: there is no part or step $word" >&2
    exit 2
  fi
done
LARGEST=$((15 * 1024 * 1024)) # bytes of a file in a tar: a trace may be larger
LEAST=30                      # seconds in which no step can do anything
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
started=$SECONDS failed=() skipped=() late=()

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then CUDA=1; else CUDA= QUICK=1; fi
QUICK=${QUICK:-}
if [ "$QUICK" ]; then
  SOAK=20 QUICK_MUSIC=$XDG_CACHE_HOME/quick_music
  SONGS=(tools/make_demo_music.py "$QUICK_MUSIC" --songs 16 --seconds 10 11)
  MATERIAL=(--music "$QUICK_MUSIC")
  ANEW=(--music "$QUICK_MUSIC") # for the sweeps that pack again
  SMALL=(--set encoder.simsiam.backbone=resnet18 --set encoder.simsiam.projection_dim=32
    --set encoder.simsiam.predictor_hidden_dim=8 --set encoder.batch_size=4 --set data.threads=1)
  BENCH=(--seconds 0.1 --windows 2 --threads 1 --workers 1 --batch-size 4 --view-seconds 10)
  SHORT=(--steps 2 --batch-sizes 2 4 --set data.view_seconds=10)
  RUN=(--config configs/demo.yaml --songs 16 --segment-seconds 5 --steps 16 --set encoder.batch_size=4)
  EMBED=(--batch-size 4 --windows 2) HALF=()
else
  SOAK=400 SONGS=() MATERIAL=(--segments 2048) # 16 batches of configs/gpu.yaml
  ANEW=(--batch-size 32)                       # for the sweeps that pack again
  BENCH=(--seconds 1)
  SHORT=(--steps 10 --batch-sizes 32 64 128 192)
  SMALL=() EMBED=() HALF=(--batch-size 64)
  RUN=(--songs 352) # at least four batches of configs/gpu.yaml
fi

left() { echo $((BUDGET - SECONDS + started)); }

# asked PART NAME: whether ONLY has the part or the step.
asked() { [[ " $ONLY " == *" $1 "* || " $ONLY " == *" $2 "* ]]; }

# keep PART: its logs and results as one file, whole at any time.
keep() {
  find "$WORK/$1" -type f -size -"$LARGEST"c -printf '%P\0' |
    tar --null -C "$WORK/$1" -czf "$OUT/.$1.part" -T - && mv "$OUT/.$1.part" "$OUT/$1.tar.gz"
}

# step PART NAME SECONDS COMMAND...: run it for at most that long and within the budget; FOLDER in it is the part's. A
# rehearsal without CUDA has the budget only: nothing is known of how fast its host is.
step() {
  local part=$1 name=$2 limit=$3
  shift 3
  asked "$part" "$name" || return 0
  if [ "$(left)" -lt "$LEAST" ]; then
    late+=("$part/$name")
    return
  fi
  if [ "$limit" -gt "$(left)" ] || [ -z "$CUDA" ]; then limit=$(left); fi
  mkdir -p "$WORK/$part"
  echo "== $part/$name"
  local began=$SECONDS log="$WORK/$part/$name.log" status=0
  timeout --kill-after=10 "$limit" "${@//FOLDER/$WORK/$part}" >"$log" 2>&1 || status=$?
  tail -n 25 "$log"
  # What a step left out itself: it says so in a line of its own, and pytest in one for each test.
  while read -r name_of; do skipped+=("$part/$name:$name_of"); done < <(
    sed -nE 's/^skipped, no CUDA device: (.*)$/\1/p; s/^([^ ]+::[^ ]+) SKIPPED.*$/\1/p' "$log" | tr ' ' '-'
  )
  if [ "$status" -eq 0 ]; then
    echo "== $part/$name: done in $((SECONDS - began)) s"
  else
    echo "== $part/$name: FAILED with status $status after $((SECONDS - began)) s"
    failed+=("$part/$name")
  fi
  keep "$part"
}

# cuda PART NAME ...: a step that says nothing without CUDA.
cuda() {
  if [ "$CUDA" ]; then
    step "$@"
  elif asked "$1" "$2"; then
    skipped+=("$1/$2")
  fi
}

# bench WORD PART NAME SECONDS OPTIONS...: throughput.py, by `step` or `cuda`.
bench() {
  local how=$1 part=$2 name=$3 limit=$4
  shift 4
  "$how" "$part" "$name" "$limit" "$PYTHON" benchmarks/throughput.py --json "FOLDER/$name.json" \
    "${BENCH[@]}" "${SMALL[@]}" "$@"
}

step a tests 500 "$PYTHON" -m pytest -v -p no:cacheprovider -m gpu "${GPU_TESTS[@]}"

step b run 530 "$PYTHON" benchmarks/killed_run.py --out FOLDER ${SHARDS:+--shards "$SHARDS"} "${RUN[@]}"

# What the other steps measure: made once, and kept in the cache for the next command.
ON=()
for word in $ONLY; do
  case $word in a | b | tests | run) continue ;; c | d) part=$word ;; *) part=single ;; esac
  if [ "$QUICK" ]; then ONLY="$ONLY songs" step "$part" songs 300 "$PYTHON" "${SONGS[@]}"; fi
  ONLY="$ONLY material" step "$part" material 300 "$PYTHON" benchmarks/material.py "${MATERIAL[@]}"
  made=$(tail -n 1 "$WORK/$part/material.log" 2>/dev/null)
  if [ -d "$made" ]; then ON=(--shards "$made"); fi
  break
done

bench step c train 200 --stages loader/train model train "${ON[@]}"
step c step 150 "$PYTHON" benchmarks/gpu_step.py --json FOLDER/step.json "${SMALL[@]}" "${SHORT[@]}" "${ON[@]}"
bench step c loader 200 "${ON[@]}" \
  --stages loader/read loader/decode loader/resample loader/mel loader/light loader/all
bench step c sweep-batch 120 --sweep batch --stages loader/all "${ON[@]}"

bench cuda d baseline-gpu 200 --windows 3 --stages loader/all baseline/gpu_light baseline/gpu_full "${ON[@]}"
bench step d baseline 200 --windows 3 "${ON[@]}" \
  --stages loader/light loader/all baseline/light baseline/full
bench step d baseline-train 200 --windows 3 --stages baseline/train "${ON[@]}"
# The training's options one by one, each against part c's `train`: what does each of them give?
bench cuda d compile 400 --windows 3 --stages model train --set train.compile=true "${ON[@]}"
bench cuda d fp32 90 --stages model train --set train.precision=fp32 "${ON[@]}"
bench cuda d contiguous 90 --stages model train --set train.channels_last=false "${ON[@]}"
bench cuda d recompute 90 --stages model train --set train.activation_checkpointing=true "${ON[@]}"
bench cuda d cpu-graph 120 --device cpu --threads "$(nproc)" --stages loader/light loader/all "${ON[@]}"
step d embed 90 "$PYTHON" benchmarks/embed.py --seconds 1 --json FOLDER/embed.json "${SMALL[@]}" "${EMBED[@]}" "${ON[@]}"
bench step d soak 150 --soak "$SOAK" "${ON[@]}"
bench step d seconds 120 --sweep seconds --stages loader/light "${ON[@]}"
# Its five graphs are alive side by side: of 128 segments each they would need 100 GB of a GPU.
bench step d threads 120 "${HALF[@]}" --sweep threads --stages loader/all "${ON[@]}"
bench step d rate 200 --sweep rate --stages loader/light "${ANEW[@]}"
bench step d codec 200 --sweep codec --stages loader/light "${ANEW[@]}"

echo "== all in $((SECONDS - started)) s of $BUDGET, results in $OUT"
if [ ${#skipped[@]} -gt 0 ]; then
  echo "skipped, no CUDA device:"
  printf '  %s\n' "${skipped[@]}"
fi
if [ ${#late[@]} -gt 0 ]; then echo "not begun, no time left (name them in ONLY): ${late[*]}"; fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
if [ ${#late[@]} -gt 0 ]; then exit 3; fi
