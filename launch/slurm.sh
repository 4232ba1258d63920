#!/bin/bash
# Trains on several GPU nodes under Slurm, one process per GPU. From the repository's root, the environment active:
#
#   export WORKDIR=/shared/runs/8b
#   sbatch --test-only launch/slurm.sh                                    # would Slurm take it, and when?
#   sbatch launch/slurm.sh --config.data.path=/shared/data/pretrain
#   sbatch --nodes=4 --time=7-0 launch/slurm.sh --config.accumulation=2   # any setting of Slurm's, or of the training's
#   tail -f slurm-JOB.log $WORKDIR/logs/slurm-JOB-0.log                   # this script; process 0 (each has its own)
#   scancel --signal=TERM JOB                                             # save and start again
#   scontrol update jobid=JOB requeue=0 && scancel --signal=TERM JOB      # save and end for good
#   scancel JOB                       # end for good at once: saved only if that takes less than Slurm's KillWait
#
# WORKDIR and the data are on a file system that all nodes share. The first submission and every start after it are the
# same command: training goes on from the newest whole checkpoint.
#
# Saved before the end: 300 seconds before the time limit (up to 360: Slurm looks once a minute) Slurm sends SIGTERM to
# the training, which saves and leaves with 143. If a save takes longer than that: sbatch --signal=TERM@900.
#
# Started again, under the same job number:
#   143 saved after SIGTERM (or, having nothing to save yet, ended by it): always.
#   134 lost a peer, 137 killed or out of memory, any other signal: at most MAX_CRASHES times in a row; a start that
#       lasted STEADY_SECONDS begins a new row.
#   A node that failed and a preempted job: by Slurm itself (--requeue), if the cluster's configuration allows it.
# Not started again: 0 finished; 1 failed (non-finite, full disk); 2 a mistake of the user's, also if only one process
#   said so and its peers, left alone, aborted; after scancel JOB.
#
# One process per GPU, not per node: JAX recognises Slurm and gives the process of local rank i the GPU i and no other.
# So do not bind GPUs to tasks (--gpus-per-task, --gpu-bind): every process must see all GPUs of its node, which
# NCCL's NVLink transport needs too. (--ntasks-per-node=1 works as well: a process with all GPUs, whose data one process
# must then prepare for eight.) NCCL is left to find the network by itself; should it take a wrong interface, set
# NCCL_SOCKET_IFNAME (and NCCL_DEBUG=INFO to see what it takes).
#
# Validated: shellcheck; tests/launch, with stand-ins for srun and scontrol; and Slurm 22.05 on one machine with
# a stand-in for the training: --test-only, exit codes 0, 1, 2 beside an abort, 130, 137, the time limit, every kind of
# scancel above, the second start. Not run on a GPU cluster by us.
#SBATCH --job-name=llada
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append

set -euo pipefail

CONFIG=${CONFIG:-configs/8b.py:16xh100-8}
WORKDIR=${WORKDIR:?the folder of the run, shared by all nodes}
PYTHON=${PYTHON:-python}
MAX_CRASHES=${MAX_CRASHES:-5}
STEADY_SECONDS=${STEADY_SECONDS:-3600}
# As a plan counts it (llada_jax.plan); JAX itself takes three quarters of a card.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

log() { echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID: $*"; }

# Slurm's time limit does not come here: its signal goes to the training alone. scancel JOB ends this shell too (hence
# no trap: nothing below may run then).
again() {
  log "$1: starting again"
  scontrol requeue "$SLURM_JOB_ID" || log "Slurm does not requeue it: submit the same command again"
  exit "$code"
}

logs=$WORKDIR/logs
mkdir -p "$logs"
crashes=$logs/slurm-$SLURM_JOB_ID.crashes # a line each
report=$logs/slurm-$SLURM_JOB_ID.srun     # what srun itself says, of this start
log "start ${SLURM_RESTART_COUNT:-0} on ${SLURM_JOB_NODELIST:-}"

# --wait, without --kill-on-bad-exit: the first process to leave after a save must not take down one still writing; one
# that lost its peers is given the time to notice.
code=0
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=300 --kill-on-bad-exit=0 \
  --output="$logs/slurm-%j-%t.log" --open-mode=append \
  "$PYTHON" -u -m llada_jax.train --config="$CONFIG" --workdir="$WORKDIR" "$@" 2>"$report" || code=$?
cat "$report" >&2

# srun returns the highest code of all processes: 134 if one failed with 1 or 2 and its peers then aborted.
for final in 2 1; do
  if ((code)) && grep -qE "tasks? [0-9,-]+: Exited with exit code $final\$" "$report"; then code=$final && break; fi
done

if ((code == 0)); then
  log "finished"
elif ((code == 143)); then
  rm -f "$crashes"
  again "saved after SIGTERM"
elif ((code > 128 && code != 130)); then # 130: interrupted by a person
  ((SECONDS < STEADY_SECONDS)) || rm -f "$crashes"
  echo "$(date -u +%FT%TZ) $code" >>"$crashes"
  count=$(wc -l <"$crashes")
  if ((count <= MAX_CRASHES)); then again "crashed with $code, $count in a row"; fi
  log "crashed with $code, $count in a row: giving up; see $logs"
else
  log "failed with $code, not started again; see $logs"
fi
exit "$code"
