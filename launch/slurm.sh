#!/bin/bash
# Trains on several GPU nodes under Slurm, with one process per GPU. Activate the Python environment and run these
# commands from the repository's root:
#
#   export WORKDIR=/shared/runs/8b
#   sbatch --test-only launch/slurm.sh                                    # asks whether and when Slurm would run it
#   sbatch launch/slurm.sh --config.data.path=/shared/data/pretrain
#   sbatch --nodes=4 --time=7-0 launch/slurm.sh --config.accumulation=2   # adds settings of Slurm and of the training
#   tail -f slurm-JOB.log $WORKDIR/logs/slurm-JOB-0.log                   # logs of this script and of process 0
#   scancel --signal=TERM JOB                                             # saves and starts again
#   scontrol update jobid=JOB requeue=0 && scancel --signal=TERM JOB      # saves and ends for good
#   scancel JOB                       # ends for good at once; a save must take less time than Slurm's KillWait
#
# WORKDIR and the data must be on a file system that all nodes share. Each process has its own log in $WORKDIR/logs. To
# continue a run, submit the same command again: training continues from the newest complete checkpoint.
#
# Saving before the end: 300 seconds before the time limit (up to 360, because Slurm checks once a minute), Slurm sends
# SIGTERM to the training, which saves and exits with 143. If a save takes longer than that, use
# sbatch --signal=TERM@900.
#
# The job is started again, under the same job number, after these exit codes and events:
#   143 (saved after SIGTERM, or ended by SIGTERM before there was anything to save): always.
#   134 (a peer process was lost), 137 (killed, or out of memory), any other signal: at most MAX_CRASHES times in a row.
#       A start that lasted STEADY_SECONDS resets this count.
#   A failed node or a preempted job: Slurm itself starts the job again (--requeue), if the cluster's configuration
#       allows it.
# The job is not started again after 0 (finished); 1 (failed: non-finite numbers, full disk); 2 (a mistake of the user,
#   also if only one process reported it and its peers then aborted); or after scancel JOB.
#
# Why one process per GPU and not one per node: JAX recognises Slurm and gives GPU i, and no other GPU, to the process
# with local rank i. Do not bind GPUs to tasks (--gpus-per-task, --gpu-bind): every process must see all GPUs of its
# node, and NCCL's NVLink transport needs this too. (--ntasks-per-node=1 also works: one process then uses all GPUs of
# its node, but must prepare the data for all eight.) NCCL finds the network by itself. If it chooses the wrong
# interface, set NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO shows what it chooses).
#
# Validated: shellcheck; tests/launch, with stand-ins for srun and scontrol; and Slurm 22.05 on one machine with a
# stand-in for the training: --test-only, exit codes 0, 1, 130, 137, and 2 beside an abort, the time limit, every kind
# of scancel above, and the second start. We have not run it on a GPU cluster.
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
WORKDIR=${WORKDIR:?set WORKDIR to the folder of the run, on a file system that all nodes share}
case $WORKDIR in
  \~/*) WORKDIR=$HOME/${WORKDIR#\~/} ;; # the shell does not replace ~ inside quotation marks
  \~*) echo "WORKDIR=$WORKDIR: write the whole path of the home folder" >&2 && exit 2 ;;
esac
PYTHON=${PYTHON:-python}
MAX_CRASHES=${MAX_CRASHES:-5}
STEADY_SECONDS=${STEADY_SECONDS:-3600}
# The share of a GPU's memory that plans (llada_jax.plan) count on. JAX's own default is three quarters.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

log() { echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID: $*"; }

# The signal of Slurm's time limit goes only to the training, not to this shell. scancel JOB ends this shell too. It has
# no trap for SIGTERM, because the code below must not run then.
again() {
  log "$1: starting again"
  scontrol requeue "$SLURM_JOB_ID" || log "Slurm does not requeue the job: submit the same command again"
  exit "$code"
}

logs=$WORKDIR/logs
mkdir -p "$logs"
crashes=$logs/slurm-$SLURM_JOB_ID.crashes # one line per crash
report=$logs/slurm-$SLURM_JOB_ID.srun     # srun's own messages in this start
log "start ${SLURM_RESTART_COUNT:-0} on ${SLURM_JOB_NODELIST:-}"

# --wait=300 and --kill-on-bad-exit=0: the first process to exit after a save must not kill another process that is
# still writing, and processes that have lost a peer need time to notice it.
code=0
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=300 --kill-on-bad-exit=0 \
  --output="$logs/slurm-%j-%t.log" --open-mode=append \
  "$PYTHON" -u -m llada_jax.train --config="$CONFIG" --workdir="$WORKDIR" "$@" 2>"$report" || code=$?
cat "$report" >&2

# srun returns the highest exit code of all processes. If one process failed with 1 or 2 and its peers then aborted,
# that is 134. In this case use the 1 or 2 from srun's messages.
for final in 2 1; do
  if ((code)) && grep -qE "tasks? [0-9,-]+: Exited with exit code $final\$" "$report"; then code=$final && break; fi
done

if ((code == 0)); then
  log "finished"
elif ((code == 143)); then
  rm -f "$crashes"
  again "saved after SIGTERM"
elif ((code > 128 && code != 130)); then # 130 means interrupted by a person.
  ((SECONDS < STEADY_SECONDS)) || rm -f "$crashes"
  echo "$(date -u +%FT%TZ) $code" >>"$crashes"
  count=$(wc -l <"$crashes")
  if ((count <= MAX_CRASHES)); then again "crashed with $code, $count in a row"; fi
  log "crashed with $code, $count in a row: not started again; see the logs in $logs"
else
  log "failed with $code: not started again; see the logs in $logs"
fi
exit "$code"
