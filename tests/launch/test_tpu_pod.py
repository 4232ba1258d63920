"""Tests launch/tpu_pod.sh with a stand-in for gcloud that runs the commands sent to the workers."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from paths import ROOT
from standins import lines, program, until

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


# Cloud TPU. The stand-in for gcloud keeps the states of the queued resource in a file, one per line. It runs the
# commands that are sent by ssh in one home directory per worker. The file `codes` in it lists how the training ends
# each time.
_GCLOUD = r"""
printf '%s\n' "${*/--command=*/}" >>"$RECORD/gcloud"
case $4 in
  describe)
    if [ ! -s "$RECORD/states" ]; then echo "ERROR: (gcloud) NOT_FOUND: Resource" >&2; exit 1; fi
    head -n 1 "$RECORD/states"
    if [ "$(wc -l <"$RECORD/states")" -gt 1 ]; then sed -i 1d "$RECORD/states"; fi ;;
  create) echo ACTIVE >"$RECORD/states" ;;
  delete) rm "$RECORD/states" ;;
  ssh)
    for argument; do case $argument in --command=*) command=${argument#--command=} ;; esac; done
    for home in "$RECORD"/worker*; do (cd "$home" && HOME=$home bash -c "$command") || status=$?; done
    exit "${status:-0}" ;;
esac
"""
_TRAIN = r"""
cd ..
code=$(head -n 1 codes); sed -i 1d codes
echo "$*${JAX_COMPILATION_CACHE_DIR:+ $JAX_COMPILATION_CACHE_DIR}" >>starts
if [ "$code" = wait ]; then trap 'kill $!; exit 143' TERM; sleep 300 & wait; fi
case $code in 134) kill -ABRT $$ ;; 137) kill -KILL $$ ;; *) exit "$code" ;; esac
"""


class Pod:
    def __init__(self, folder: Path, *codes: str):
        self.folder, self.workers = folder, []
        for index, each in enumerate(codes):
            home = folder / f"worker{index}"
            home.mkdir()
            (home / "codes").write_text("".join(f"{code}\n" for code in each.split()))
            self.workers.append(home)

    def run(self, *arguments: str, **environment: str) -> subprocess.Popen:
        settings = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "RECORD": str(self.folder), "ZONE": "z",
            "NAME": "pod", "REPO": "a repository", "WORKDIR": "/w o/run", "POLL_SECONDS": "0", **environment,
        }  # fmt: skip
        return subprocess.Popen([LAUNCH / "tpu_pod.sh", *arguments], env=settings, cwd=ROOT)

    def starts(self) -> list[int]:
        return [len(lines(home / "starts")) for home in self.workers]

    def verbs(self, *of: str) -> list[str]:
        verbs = [line.split()[3] for line in lines(self.folder / "gcloud")]
        return [verb for verb in verbs if verb in of]


@pytest.fixture
def pod(tmp_path):
    """Returns pod(*codes), which makes a pod with one worker per argument.

    The trainings of a worker end, one after another, with the exit codes in its argument.
    """
    missing = [name for name in ("flock", "setsid", "nohup") if not shutil.which(name)]
    if missing:
        pytest.skip(f"programs not installed on this machine: {', '.join(missing)}")
    train = program(tmp_path / "bin", "train", _TRAIN)
    program(tmp_path / "bin", "gcloud", _GCLOUD)
    program(tmp_path / "bin", "sudo", '"$@"\n')
    program(tmp_path / "bin", "git", 'case $1 in clone) mkdir "${@: -1}" ;; esac; echo "$*" >>"$HOME/git"\n')
    uv = f'[ "$1" = venv ] && mkdir -p .venv/bin && ln -s {train} .venv/bin/python; exit 0'
    program(
        tmp_path / "bin", "python3",
        f'mkdir -p ~/.local/bin && printf "%s\\n" "#!/bin/bash" {uv!r} >~/.local/bin/uv && chmod +x ~/.local/bin/uv\n',
    )  # fmt: skip
    return lambda *codes: Pod(tmp_path, *codes)


@pytest.mark.parametrize(
    "codes, code, starts",
    [
        (["0", "0"], 0, 1),
        (["2", "134"], 2, 1),
        (["134", "1"], 1, 1),
        (["130", "143"], 130, 1),
        (["143 0", "143 0"], 0, 2),
        (["134 0", "137 0"], 0, 2),
        (["137 134 137 0", "134 137 134 0"], 134, 3),
        (["137 143 137 143 137 0"], 0, 6),  # A save resets the count of crashes in a row.
    ],
)
def test_tpu_pod_restarts_by_exit_code(pod, codes, code, starts):
    it = pod(*codes)
    returned = it.run("run", "--config.steps=7", "--config.data.path=a b", MAX_CRASHES="2", CACHE="gs://b/x y").wait(
        120
    )
    assert returned == code or (code == 134 and returned in (134, 137))
    assert it.starts() == [starts] * len(codes)
    expected = "-u -m llada_jax.train --config=configs/8b.py:v5p-4x4x8 --workdir=/w o/run --config.steps=7 "
    assert lines(it.workers[0] / "starts")[0] == expected + "--config.data.path=a b gs://b/x y"
    assert lines(it.workers[0] / "git")[0] == "clone --quiet a repository llada_jax"
    assert it.verbs("create", "delete") == ["create"]


def test_tpu_pod_is_requested_anew_after_preemption(pod):
    it = pod("wait 0")
    run = it.run("run")
    until(lambda: it.starts() == [1])
    training = int(lines(it.workers[0] / "pid")[0])
    # The state changes first. Otherwise the script may see the end of the training on a pod that is still active.
    (it.folder / "states").write_text("SUSPENDING\nSUSPENDED\n")
    os.kill(training, signal.SIGTERM)  # A machine's shutdown sends it too.
    assert run.wait(120) == 0
    assert it.verbs("create", "delete") == ["create", "delete", "create"]
    assert it.starts() == [2]


def test_tpu_pod_request_that_failed(pod):
    it = pod("0")
    (it.folder / "states").write_text("FAILED\n")
    assert it.run("run").wait(120) == 1
    assert it.starts() == [0] and not it.verbs("create")


def test_tpu_pod_stops_and_joins(pod):
    it = pod("wait 0", "wait 0")
    watched = [it.run("run")]
    until(lambda: it.starts() == [1, 1])
    # A second `run`, which the test recognises by its zone, joins the training and does not start a second one.
    watched.append(it.run("run", ZONE="z2"))
    until(lambda: sum("ssh pod --zone=z2" in line for line in lines(it.folder / "gcloud")) > 3)
    assert it.run("stop").wait(120) == 0
    assert [run.wait(120) for run in watched] == [143, 143]
    assert it.starts() == [1, 1]


def test_tpu_pod_says_how_to_use_it(pod):
    run = subprocess.run([LAUNCH / "tpu_pod.sh"], env={**os.environ, "ZONE": "z"}, capture_output=True, text=True)
    assert run.returncode == 2
    assert "launch/tpu_pod.sh run" in run.stdout and "set -euo" not in run.stdout


@pytest.mark.parametrize("flag", ["--node-count=2 --node-prefix=pod", "--node-id=pod"])
def test_tpu_pod_slices(pod, flag):
    it = pod()
    assert it.run("create", SLICES="2" if "count" in flag else "1", SPOT="").wait(120) == 0
    (line,) = lines(it.folder / "gcloud")
    assert flag in line and "--spot" not in line and "--accelerator-type=v5p-256" in line
