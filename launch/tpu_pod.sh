#!/bin/bash
# Trains on one or several Cloud TPU pod slices, which are requested as a queued resource. Run this script on your own
# machine, where gcloud is set up:
#
#   export NAME=llada-8b ZONE=us-east5-a REPO=https://github.com/YOU/llada_jax
#   export WORKDIR=gs://BUCKET/runs/8b CACHE=gs://BUCKET/xla
#   ssh-add ~/.ssh/google_compute_engine                                  # gcloud needs this for several workers
#   launch/tpu_pod.sh run --config.data.path=gs://BUCKET/sets/pretrain    # create, install, start, watch, restart
#   launch/tpu_pod.sh create | install | start                            # the single steps of `run`
#   launch/tpu_pod.sh logs        # follows the log of worker 0 (WORKER=5 and SLICE=1 choose another worker or slice)
#   launch/tpu_pod.sh status      # prints the queued resource's state and the state of the training on each worker
#   launch/tpu_pod.sh stop        # saves and ends on all workers, and ends `run`; the machines stay and cost money
#   launch/tpu_pod.sh delete      # gives the machines back
#
# Settings, as environment variables:
#   TYPE, RUNTIME: other hardware, e.g. TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite, or TYPE=v6e-256
#     RUNTIME=v2-alpha-tpuv6e. For v5p, the number in TYPE counts cores, two per chip. Choose a CONFIG that fits.
#   SLICES=2: two slices, joined by the data centre's network.
#   SPOT= (empty): machines that are not preemptible.
#   CACHE=gs://BUCKET/xla: compiled programs are kept there, so that new machines need not compile them again.
#   MOUNT: a command that runs as root on every worker before the training, for a WORKDIR and data on a file system that
#     all workers mount: 'mkdir -p /mnt/llada; mountpoint -q /mnt/llada || mount 10.0.0.2:/share /mnt/llada'. A bucket
#     needs no such command. The service account of the machines needs the two roles that docs/large_runs.md names.
#
# Every worker runs the same command: JAX finds the other workers through the machines' metadata, and training continues
# from the newest complete checkpoint. You may end `run` with Ctrl-C and start it again: it then joins a training that
# is still running.
#
# `run` starts the training again after these exit codes and events:
#   143 (saved after SIGTERM): always.
#   134 (a peer process was lost), 137 (killed, or out of memory), other signals, a rebooted machine: at most
#     MAX_CRASHES times in a row. A start that lasted STEADY_SECONDS resets this count.
#   A preempted resource (SUSPENDED): it is deleted, requested again and installed again.
# `run` does not start the training again after 0 (finished); 1 (failed: non-finite numbers, full disk); 2 (a mistake of
#   the user, also if only one worker reported it and its peers then aborted); a request that FAILED; or after `stop`.
# Saving before the end: a machine that is shut down sends SIGTERM to its processes, and the training saves if there is
# enough time. A preempted machine has about 30 seconds. If that is too short, config.checkpoint.every limits how much
# work is lost.
# Validated: shellcheck; tests/launch, with a stand-in for gcloud that runs the commands sent to the workers; the flags
# against gcloud 528. We have not run it on Cloud TPU.

set -euo pipefail

NAME=${NAME:-llada-8b} ZONE=${ZONE:?set ZONE to the Cloud TPU zone, e.g. us-east5-a}
TYPE=${TYPE:-v5p-256} RUNTIME=${RUNTIME:-v2-alpha-tpuv5} # 128 chips, 4x4x8
SLICES=${SLICES:-1} SPOT=${SPOT-yes}
CONFIG=${CONFIG:-configs/8b.py:v5p-4x4x8}
WORKDIR=${WORKDIR:-} REPO=${REPO:-}
COMMIT=${COMMIT:-HEAD} # The commit of REPO to run. Pin it, or a restart on new machines may run other code.
MOUNT=${MOUNT:-true} CACHE=${CACHE:-}
MAX_CRASHES=${MAX_CRASHES:-5}
STEADY_SECONDS=${STEADY_SECONDS:-3600} POLL_SECONDS=${POLL_SECONDS:-60}
GRACE_SECONDS=${GRACE_SECONDS:-600} # time to save, or to notice a lost peer

log() { echo "$(date -u +%FT%TZ) $NAME: $*" >&2; }
resources() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
on_workers() { resources ssh --worker="${2:-all}" --node="${3:-all}" --command="$1"; }

# Prints the state of the queued resource: ACTIVE, SUSPENDED, ...; MISSING if it does not exist; UNKNOWN if gcloud could
# not be asked.
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

# On a worker, the training holds a lock on the file `lock` while it runs, its process id is in the file `pid`, and its
# exit code is in the file `exit_code` after it has ended.
idle='flock -n -s lock true'

# uv installs Python, because the Python of the machine's image may be older than 3.11. Workers on which the training
# runs are left alone.
install() {
  on_workers "$idle || exit 0; set -e; sudo bash -c $(printf %q "$MOUNT"); python3 -m pip install --quiet --user uv
    [ -d llada_jax ] || git clone --quiet $(printf %q "$REPO") llada_jax
    cd llada_jax; git fetch --quiet; git checkout --quiet --detach $(printf %q "$COMMIT")
    [ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
    ~/.local/bin/uv pip install --quiet -e '.[tpu,gcs]'"
}

# Starts the training detached, so that it continues after the connection has ended. Does nothing on workers on which
# the training already runs. After the first start of a `run`, does nothing on workers on which `stop` was called.
anew='rm -f stopped;'
start() {
  local train
  train=$(printf '%q ' env ${CACHE:+"JAX_COMPILATION_CACHE_DIR=$CACHE"} .venv/bin/python -u -m llada_jax.train \
    --config="$CONFIG" --workdir="$WORKDIR" "$@")
  train="cd llada_jax; $train 9>&- & echo \$! >../pid; wait \$!; echo \$? >../exit_code"
  on_workers "exec 9>lock; flock -w 5 9 || exit 0; $anew [ ! -f stopped ] || exit 0; rm -f exit_code
    nohup setsid bash -c $(printf %q "$train") >>train.log 2>&1 </dev/null &"
}

signal() { on_workers "$idle || kill -$1 \$(cat pid)" >/dev/null || true; }
stop() { on_workers 'touch stopped' >/dev/null && signal TERM; }

# Prints one word per worker: its exit code, running, gone (rebooted), or stopped (by `stop`). Prints nothing for a
# worker that does not answer.
words() {
  on_workers "if ! $idle; then echo training: running; elif [ -f stopped ]; then echo training: stopped
    elif [ -f exit_code ]; then echo training: \$(cat exit_code); else echo training: gone; fi" |
    sed -n 's/^.*training: //p' || true
}

# Prints the result of one start: an exit code, stopped, or lost (the machines no longer exist).
watch() {
  local said word waited=0
  while true; do
    sleep "$POLL_SECONDS"
    case $(state) in ACTIVE | UNKNOWN) ;; *) echo lost && return ;; esac
    said=$(words)
    [[ -n $said ]] || log "no worker answers"
    if [[ $said =~ ^(running[[:space:]]*)*$ ]]; then continue; fi
    if grep -qx running <<<"$said"; then # Some workers have ended. The others are saving, or have not yet noticed.
      waited=$((waited + POLL_SECONDS))
      if ((waited > 2 * GRACE_SECONDS)); then signal KILL; elif ((waited > GRACE_SECONDS)); then signal TERM; fi
      continue
    fi
    for word in stopped 2 1 130; do # One such worker decides: its peers aborted only because of it.
      if grep -qx "$word" <<<"$said"; then echo "$word" && return; fi
    done
    awk '{c = $1 == "gone" ? 137 : +$1} c && c < 128 {other = c} c == 143 {saved = c} c > 128 && c != 143 {crash = c}
      END {print other ? other : crash ? crash : saved ? saved : 0}' <<<"$said"
    return
  done
}

run() {
  local crashes=0 begun verdict
  : "${REPO:?set REPO to the repository that the workers clone}" "${WORKDIR:?set WORKDIR to the folder of the run}"
  while true; do
    case $(state) in
      MISSING) log "requesting $TYPE" && create ;;
      FAILED) log "the request for $TYPE failed:" && resources describe >&2 && return 1 ;;
      SUSPENDED) log "preempted: requesting $TYPE again" && resources delete --force --quiet ;;
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
          log "not started again: see launch/tpu_pod.sh logs" && return "$verdict"
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
