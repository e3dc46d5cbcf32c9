#!/usr/bin/env bash
# One node's part of a run: the one place where torchrun is called. local.sh, slurm.sbatch and kubernetes/*.yaml say
# where the node stands and end here:
#
#   NODES=2 NODE_RANK=0 RENDEZVOUS=node-a:29400 RUN_ID=a launch/node.sh train run.yaml
#   NODES=2 NODE_RANK=1 RENDEZVOUS=node-a:29400 RUN_ID=a launch/node.sh train run.yaml      # on the other
#
#   NODES, NODE_RANK     how many nodes there are, and which one this is (1, 0)
#   PROCESSES_PER_NODE   a number, or gpu: as many as it has (gpu)
#   RENDEZVOUS           host:port on node 0 that every node can reach (localhost:0, which will do for one node)
#   RUN_ID               the same on all nodes, another for every run that meets at the same place (rpo)
#   NODE_ADDRESS         what the other nodes call this one, if that is not its host name
#   MAX_RESTARTS         how often torchrun starts all processes anew when one fails (0: leave it to the scheduler)
#
# What each process prints goes to the terminal and to RUN_DIR/logs/nodeN/. SIGTERM and SIGUSR1 stop a training run after
# the step, with a checkpoint; however long that takes, until somebody sends SIGKILL. Exit code: 0 when the verb is done,
# 75 when it was stopped here by a signal, otherwise torchrun's.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: [NODES=...] $0 VERB [FILE.yaml] [key.path=value ...]" >&2
  exit 2
fi

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -d $checkout/.venv/bin ]]; then
  PATH=$checkout/.venv/bin:$PATH
fi
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1                                             # into the log as it happens, not when it is over
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank \${rank}] "       # torchrun fills it in
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                          # as torchrun, without its warning
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # megatron overlaps communication only with 1

node=${NODE_RANK:-0}
rendezvous=(
  --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-0}"
  --rdzv-backend c10d --rdzv-id "${RUN_ID:-rpo}" --rdzv-endpoint "${RENDEZVOUS:-localhost:0}"
  # Node 0 hosts the rendezvous, whatever its names are. The others wait that long for it, e.g. while it pulls an image.
  --rdzv-conf "is_host=$((node == 0)),read_timeout=600"
)
if [[ -n ${NODE_ADDRESS:-} ]]; then
  rendezvous+=(--local-addr "$NODE_ADDRESS")
fi
log_dir=$(python3 "$checkout/launch/log_dir.py" "$@")/node$node

# torchrun passes SIGTERM on, but kills after 30 s, when a large checkpoint is not written yet. So its processes get the
# signal from here, and torchrun only when they are gone. Slurm sends SIGUSR1 to every process: torchrun, and processes
# that have nothing to save yet, ignore it.
asked='' interrupted=''
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {
  trap '' TERM USR1 # once is enough
  asked=yes interrupted=yes
  echo "node $node: asked to stop" >&2
  local workers
  read -ra workers < <(cat "/proc/$torchrun/task/"*/children 2>/dev/null) || true
  if kill -TERM "${workers[@]}" 2>/dev/null; then
    while kill -0 "${workers[@]}" 2>/dev/null; do
      sleep 1
    done
  fi
  for _ in {1..10}; do # it ends by itself, unless it starts its processes anew or has none yet
    kill -0 "$torchrun" 2>/dev/null || return 0
    sleep 1
  done
  kill -TERM "$torchrun" 2>/dev/null || true
}

set -m # a process group of its own, or bash has the background ignore Ctrl-C
(
  trap '' USR1
  exec torchrun "${rendezvous[@]}" --log-dir "$log_dir" --tee 3 -m rpo_megatron "$@"
) &
torchrun=$!
trap stop TERM USR1
trap 'interrupted=yes; kill -INT -- "-$torchrun"' INT
trap 'interrupted=yes; kill -HUP -- "-$torchrun"' HUP # the terminal was closed

code=0
wait "$torchrun" || code=$?
while [[ -n $interrupted ]]; do # that ended the wait, and torchrun perhaps not yet
  interrupted=
  code=0
  wait "$torchrun" || code=$?
done
if [[ -n $asked && $code -ne 0 ]]; then
  code=75
fi
exit "$code"
