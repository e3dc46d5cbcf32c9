#!/usr/bin/env bash
# One machine, NPROC processes (as many as GPUs; on a machine without, any number):
#
#   launch/local.sh 4 train run.yaml parallel.tensor=2 parallel.pipeline=2
#
# Works from any directory. Uses the activated environment, or else the .venv that `make setup` made in this checkout.
# Logs, signals and exit codes: see node.sh.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 NPROC VERB [FILE.yaml] [key.path=value ...]" >&2
  exit 2
fi
processes=$1
shift

# The cores are shared out: with torch's default, every process would start a thread for each of them.
threads=$(($(getconf _NPROCESSORS_ONLN) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export NODES=1 NODE_RANK=0 PROCESSES_PER_NODE=$processes RENDEZVOUS=localhost:0
export RUN_ID=${RUN_ID:-local} MAX_RESTARTS=${MAX_RESTARTS:-0}
exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" "$@"
