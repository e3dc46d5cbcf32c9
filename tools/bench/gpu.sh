#!/usr/bin/env bash
# Everything that needs a GPU, with one table last. NOT YET RUN on one.
#
#     tools/bench/gpu.sh [tests] [kernels] [steps] [fp8] [report]
#
# Parts are run in the order given, all four and the report without arguments; each ends by itself within ten minutes
# (the four together within half an hour) and writes into OUT (bench-results/gpu), where `report` finds what earlier
# calls left. Needs this package's requirements in the active Python, and Transformer Engine for the rows that say so;
# what the machine cannot do is listed with the reason. The exit status is that of the tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT="${OUT:-bench-results/gpu}" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python3 -m tools.bench.gpu "$@"
