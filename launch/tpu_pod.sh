#!/bin/bash
# Trains on a Cloud TPU pod slice, or several, obtained as a queued resource. Runs on your own machine, with gcloud:
#
#   export NAME=llada-8b ZONE=us-east5-a REPO=https://github.com/YOU/llada_jax WORKDIR=/mnt/llada/runs/8b
#   export MOUNT='mkdir -p /mnt/llada; mountpoint -q /mnt/llada || mount 10.0.0.2:/share /mnt/llada'
#   ssh-add ~/.ssh/google_compute_engine                                  # gcloud asks for it with several workers
#   launch/tpu_pod.sh run --config.data.path=/mnt/llada/data/pretrain     # create, install, start, watch, restart
#   launch/tpu_pod.sh create | install | start                            # the single steps of `run`
#   launch/tpu_pod.sh logs        # follows the log of worker 0 (WORKER=5: of another; SLICE=1: of another slice)
#   launch/tpu_pod.sh status      # the queued resource's state, and what each worker says
#   launch/tpu_pod.sh stop        # saves and ends on all workers, `run` too; the machines stay (and cost)
#   launch/tpu_pod.sh delete      # gives the machines back
#
# Other hardware: TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite, TYPE=v6e-256 RUNTIME=v2-alpha-tpuv6e (v5p: TYPE counts
# cores, two per chip), with a CONFIG that fits. SLICES=2: two slices, joined by the data centre's network. SPOT=: not
# preemptible. WORKDIR and the data are on a file system that all workers mount (MOUNT runs as root: Filestore, Lustre,
# NFS). Every worker runs the same command: JAX finds the others by the machines' metadata, and training goes on from
# the newest whole checkpoint. `run` may be ended (Ctrl-C) and begun again: it joins a training that is under way.
#
# Started again by `run`: 143 saved after SIGTERM, always; 134 lost a peer, 137 killed or out of memory, other signals,
#   a rebooted machine, at most MAX_CRASHES times in a row (a start that lasted STEADY_SECONDS begins a new row). A
#   preempted resource (SUSPENDED) is deleted, requested and installed anew.
# Not started again: 0 finished; 1 failed (non-finite, full disk); 2 a mistake of the user's, also if only one worker
#   said so and its peers aborted; a request that FAILED; after `stop`.
# Saved before the end: a machine that is shut down sends SIGTERM to its processes and the training saves if the time
# suffices: about 30 seconds on a preempted machine. If not, config.checkpoint.every bounds what is lost.
# Validated: shellcheck; tests/launch, with a stand-in for gcloud that runs what is sent to the workers; the
# flags by gcloud 528. Not run on Cloud TPU by us.

set -euo pipefail

NAME=${NAME:-llada-8b} ZONE=${ZONE:?the zone, e.g. us-east5-a}
TYPE=${TYPE:-v5p-256} RUNTIME=${RUNTIME:-v2-alpha-tpuv5} # 128 chips, 4x4x8
SLICES=${SLICES:-1} SPOT=${SPOT-yes}
CONFIG=${CONFIG:-configs/8b.py:v5p-4x4x8}
WORKDIR=${WORKDIR:-} REPO=${REPO:-}
COMMIT=${COMMIT:-HEAD} # of REPO: pin it, or a restart on new machines may run other code
MOUNT=${MOUNT:-true}
MAX_CRASHES=${MAX_CRASHES:-5}
STEADY_SECONDS=${STEADY_SECONDS:-3600} POLL_SECONDS=${POLL_SECONDS:-60}
GRACE_SECONDS=${GRACE_SECONDS:-600} # for a save, and to notice a lost peer

log() { echo "$(date -u +%FT%TZ) $NAME: $*" >&2; }
resources() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
on_workers() { resources ssh --worker="${2:-all}" --node="${3:-all}" --command="$1"; }

# ACTIVE, SUSPENDED, ...; MISSING if there is none; UNKNOWN if gcloud could not tell.
state() {
  local said
  said=$(resources describe --format='value(state.state)' 2>&1) || said="FAILED to ask: $said"
  case $said in 'FAILED to ask'*NOT_FOUND*) echo MISSING ;; 'FAILED to ask'*) echo UNKNOWN ;; *) echo "$said" ;; esac
}

create() {
  local nodes=(--node-id="$NAME")
  ((SLICES == 1)) || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  resources create --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${nodes[@]}" ${SPOT:+--spot} --async
}

# On a worker the training holds a lock while it runs, its process number is in `pid`, and it leaves `exit_code`.
idle='flock -n -s lock true'

# uv brings the Python: that of the machine's image may be older than 3.11. Nothing is touched where the training runs.
install() {
  on_workers "$idle || exit 0; set -e; sudo bash -c $(printf %q "$MOUNT"); python3 -m pip install --quiet --user uv
    [ -d llada_jax ] || git clone --quiet $(printf %q "$REPO") llada_jax
    cd llada_jax; git fetch --quiet; git checkout --quiet --detach $(printf %q "$COMMIT")
    [ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
    ~/.local/bin/uv pip install --quiet -e '.[tpu]'"
}

# Detached, so that it outlives the connection. Nothing happens where the training runs, and, after the first start of
# a `run`, where `stop` has been.
anew='rm -f stopped;'
start() {
  local train
  train=$(printf '%q ' .venv/bin/python -u -m llada_jax.train --config="$CONFIG" --workdir="$WORKDIR" "$@")
  train="cd llada_jax; $train 9>&- & echo \$! >../pid; wait \$!; echo \$? >../exit_code"
  on_workers "exec 9>lock; flock -w 5 9 || exit 0; $anew [ ! -f stopped ] || exit 0; rm -f exit_code
    nohup setsid bash -c $(printf %q "$train") >>train.log 2>&1 </dev/null &"
}

signal() { on_workers "$idle || kill -$1 \$(cat pid)" >/dev/null || true; }
stop() { on_workers 'touch stopped' >/dev/null && signal TERM; }

# A word per worker: its exit code, running, gone (rebooted), stopped (by `stop`); none of one that does not answer.
words() {
  on_workers "if ! $idle; then echo training: running; elif [ -f stopped ]; then echo training: stopped
    elif [ -f exit_code ]; then echo training: \$(cat exit_code); else echo training: gone; fi" |
    sed -n 's/^.*training: //p' || true
}

# Prints the verdict on one start: an exit code, stopped, or lost (the machines are not there any more).
watch() {
  local said word waited=0
  while true; do
    sleep "$POLL_SECONDS"
    case $(state) in ACTIVE | UNKNOWN) ;; *) echo lost && return ;; esac
    said=$(words)
    [[ -n $said ]] || log "no worker answers"
    if [[ $said =~ ^(running[[:space:]]*)*$ ]]; then continue; fi
    if grep -qx running <<<"$said"; then # some have left: the others are saving, or blocked until they notice
      waited=$((waited + POLL_SECONDS))
      if ((waited > 2 * GRACE_SECONDS)); then signal KILL; elif ((waited > GRACE_SECONDS)); then signal TERM; fi
      continue
    fi
    for word in stopped 2 1 130; do # one worker's mistake decides: its peers have aborted, and must not start again
      if grep -qx "$word" <<<"$said"; then echo "$word" && return; fi
    done
    awk '{c = $1 == "gone" ? 137 : +$1} c && c < 128 {other = c} c == 143 {saved = c} c > 128 && c != 143 {crash = c}
      END {print other ? other : crash ? crash : saved ? saved : 0}' <<<"$said"
    return
  done
}

run() {
  local crashes=0 begun verdict
  : "${REPO:?where the workers clone this repository from}" "${WORKDIR:?the folder of the run, on all workers}"
  while true; do
    case $(state) in
      MISSING) log "requesting $TYPE" && create ;;
      FAILED) log "the request failed:" && resources describe >&2 && return 1 ;;
      SUSPENDED) log "preempted: requesting anew" && resources delete --force --quiet ;;
      ACTIVE)
        begun=$SECONDS
        if install && start "$@"; then anew='' && verdict=$(watch); else verdict=255; fi # 255: not all were reached
        case $verdict in
          0) log "finished" && return 0 ;;
          stopped) log "stopped" && return 143 ;;
          lost | 143) log "$verdict: starting again" && crashes=0 && continue ;;
        esac
        ((SECONDS - begun < STEADY_SECONDS)) || crashes=0
        crashes=$((crashes + 1))
        log "ended with $verdict, $crashes in a row"
        if ((verdict < 128 || verdict == 130 || crashes > MAX_CRASHES)); then
          log "not started again: see logs" && return "$verdict"
        fi
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

case ${1:-} in
  create | install | start | stop | run) "$@" ;;
  status) state && words ;;
  logs) on_workers 'tail -n 100 -F train.log' "${WORKER:-0}" "${SLICE:-0}" ;;
  delete) resources delete --force --quiet ;;
  *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
