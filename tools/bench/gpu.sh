#!/usr/bin/env bash
# Everything that needs a GPU, in one call, with a table last: tests, kernels, whole steps. NOT YET RUN on one.
#
#     tools/bench/gpu.sh [OUTPUT_DIRECTORY]
#
# Needs this package's requirements in the active Python, and Transformer Engine for the rows that say so. What the
# machine cannot do is listed with the reason; the exit status is that of the tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${1:-bench-results/gpu}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

section() {
  echo
  echo "== $*"
}

section "machine"
python -m rpo_megatron doctor | tee "$out/doctor.txt"

section "tests/gpu"
python -m pytest tests/gpu -s -q 2>&1 | tee "$out/tests.txt"
status=${PIPESTATUS[0]}

section "kernels"
python -m tools.bench.gpu_kernels 2>&1 | tee "$out/kernels.txt"

for model in 1b 8b-slice; do
  for responses in 2 4; do
    section "step: $model, K=$responses"
    python -m tools.bench.gpu_step "$out/step-$model-k$responses.json" --model "$model" --responses "$responses" 2>&1 |
      tee "$out/step-$model-k$responses.txt"
  done
done

section "summary"
grep -E "passed|failed|skipped" "$out/tests.txt" | tail -1
tail -n +2 -q "$out"/step-*.txt
exit "$status"
