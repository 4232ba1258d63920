"""The launchers: well-formed files, and retries that follow the exit codes, with stand-ins for the clusters."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def _program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return path


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", script], check=True)


def test_dockerfile():
    text = (LAUNCH / "Dockerfile").read_text()
    code = re.sub(r"\\\n", " ", "".join(line for line in text.splitlines(True) if not line.startswith("#")))
    steps = [line.split(None, 1) for line in code.splitlines() if line.strip()]
    assert steps[0] == ["FROM", "python:3.12-slim"]
    assert {name for name, _ in steps} <= set("FROM RUN ARG WORKDIR COPY USER ENV ENTRYPOINT CMD".split())
    last = {name: value for name, value in steps}
    # Exec form: a shell in between would keep SIGTERM from the training.
    assert ast.literal_eval(last["ENTRYPOINT"]) == ["tini", "--"]
    assert ast.literal_eval(last["CMD"])[:3] == ["python", "-m", "llada_jax.train"]
    assert last["USER"] not in ("root", "0")
    for name, value in steps:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in value.split()[:-1]), value


# The fields of the JobSet API, jobset.x-k8s.io/v1alpha2 (of release 0.10), and of batch/v1 that the file may use.
_FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        "replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator",
        "managedBy", "ttlSecondsAfterFinished",
    },
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.failurePolicy.rules": {
        "name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns", "targetReplicatedJobs",
    },
    "spec.replicatedJobs": {"name", "groupName", "template", "replicas", "dependsOn"},
    "spec.replicatedJobs.template": {"metadata", "spec"},
    "spec.replicatedJobs.template.spec": {
        "parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy", "template",
        "activeDeadlineSeconds", "podReplacementPolicy",
    },
    "spec.replicatedJobs.template.spec.podFailurePolicy": {"rules"},
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules": {"action", "onExitCodes", "onPodConditions"},
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules.onExitCodes": {"containerName", "operator", "values"},
    "spec.replicatedJobs.template.spec.podFailurePolicy.rules.onPodConditions": {"type", "status"},
}  # fmt: skip


def _check_fields(value, path: str = "") -> None:
    if isinstance(value, list):
        for item in value:
            _check_fields(item, path)
    elif isinstance(value, dict) and path in _FIELDS:
        assert set(value) <= _FIELDS[path], f"{path}: {set(value) - _FIELDS[path]}"
        for name, item in value.items():
            _check_fields(item, f"{path}.{name}".lstrip("."))


@pytest.fixture
def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "gke.yaml").read_text())


def _job(jobset: dict) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_jobset_fields(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    _check_fields(jobset)
    job = _job(jobset)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy requires
    (container,) = pod["containers"]
    assert "command" not in container  # it would replace the image's entry point, which passes SIGTERM on
    assert container["args"][:3] == ["python", "-m", "llada_jax.train"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # As many pods as the slice has hosts.
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    assert pod["terminationGracePeriodSeconds"] >= 300


@pytest.mark.parametrize(
    "pod, action",
    [
        (143, "RestartJobSetAndIgnoreMaxRestarts"),
        ("DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (134, "RestartJobSet"),
        (137, "RestartJobSet"),
        (139, "RestartJobSet"),
        (1, "FailJobSet"),
        (2, "FailJobSet"),
        (127, "FailJobSet"),
        (130, "FailJobSet"),
    ],
)
def test_jobset_restarts_by_exit_code(jobset, pod, action):
    """The two levels of rules, followed as the Job's and the JobSet's controller do."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(_job(jobset)["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            assert codes["operator"] == "In" and codes["containerName"] == "train"
            fits, what = pod in codes["values"], f"Container train for pod default/x failed with exit code {pod}"
        else:
            assert all(condition["status"] == "True" for condition in rule["onPodConditions"])
            fits = pod in [condition["type"] for condition in rule["onPodConditions"]]
            what = f"Pod default/x has condition {pod}"
        if fits:
            reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {index}"
            break
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    for rule in policy["rules"]:
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            assert rule["action"] == action
            return
    assert action == "RestartJobSet"  # the default, bounded by maxRestarts


def test_kubectl_reads_the_pods(jobset, tmp_path):
    """The types of the Job within, decoded by kubectl; --dry-run=client would ask a server, --local does not."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": _job(jobset)}
    claim = yaml.safe_load((LAUNCH / "gke_workdir.yaml").read_text())
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "none")}
    for item, change in ((job, ["set", "image", "train=x"]), (claim, ["label", "a=b"])):
        path = tmp_path / "item.json"
        path.write_text(json.dumps(item))
        subprocess.run(["kubectl", *change, "--local", "-f", path, "-o", "name"], check=True, env=environment)


def test_workdir_claim_is_the_one_mounted(jobset):
    claim = yaml.safe_load((LAUNCH / "gke_workdir.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in _job(jobset)["template"]["spec"]["volumes"][:1]]
    assert claims == [claim["metadata"]["name"]]


# Slurm. The stand-in for srun says and returns what the real one does for tasks that end with the codes in $TASKS.
_SRUN = r"""
printf '%s\n' "$*" >>"$RECORD/srun"
highest=0 task=0
for code in $TASKS; do
  if [ "$code" = wait ]; then
    bash -c 'trap "exit 143" TERM; echo $$ >"$RECORD/step"; sleep 60 & wait; kill $!' & wait $!; code=$?
  fi
  case $code in
    0) ;;
    134) echo "srun: error: n1: task $task: Aborted (core dumped)" >&2 ;;
    137) echo "srun: error: n1: task $task: Killed" >&2 ;;
    *) echo "srun: error: n1: tasks $task-$task: Exited with exit code $code" >&2 ;;
  esac
  if [ "$code" -gt "$highest" ]; then highest=$code; fi
  task=$((task + 1))
done
exit "$highest"
"""


@pytest.fixture
def slurm(tmp_path):
    """slurm(tasks, **environment): a started slurm.sh whose processes end with these codes."""
    _program(tmp_path / "bin", "srun", _SRUN)
    _program(tmp_path / "bin", "scontrol", 'echo "$*" >>"$RECORD/scontrol"\n')

    def start(tasks: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [LAUNCH / "slurm.sh", "--config.steps=7"],
            env={
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(tmp_path), "TASKS": tasks,
                "WORKDIR": str(tmp_path / "run"), "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "3", **environment,
            },
            cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    return start


@pytest.mark.parametrize(
    "tasks, code, again",
    [
        ("0 0", 0, False),
        ("1 1", 1, False),
        ("2 2", 2, False),
        ("2 134", 2, False),  # one process's mistake; its peer lost it and aborted
        ("134 1 137", 1, False),
        ("143 143", 143, True),
        ("134 134", 134, True),
        ("0 137", 137, True),
        ("127 127", 127, False),
        ("130 130", 130, False),
    ],
)
def test_slurm_requeues_by_exit_code(slurm, tmp_path, tasks, code, again):
    assert slurm(tasks).wait(30) == code
    assert _lines(tmp_path / "scontrol") == ["requeue 42"] * again
    (command,) = _lines(tmp_path / "srun")
    assert command.endswith(
        f"python -u -m llada_jax.train --config=configs/8b.py:16xh100-8 --workdir={tmp_path / 'run'} --config.steps=7"
    )
    assert "--cpus-per-task=3" in command and "--kill-on-bad-exit=0" in command


def test_slurm_gives_up_after_crashes_in_a_row(slurm, tmp_path):
    def requeued(tasks: str, **environment: str) -> bool:
        before = len(_lines(tmp_path / "scontrol"))
        slurm(tasks, MAX_CRASHES="2", **environment).wait(30)
        return len(_lines(tmp_path / "scontrol")) > before

    assert [requeued("134") for _ in range(3)] == [True, True, False]
    assert requeued("143") and requeued("137") and requeued("134")  # a save begins a new row
    assert not requeued("134")
    assert requeued("134", STEADY_SECONDS="0")  # so does a start that lasted


def test_slurm_saves_before_the_time_limit(slurm, tmp_path):
    """Slurm sends SIGTERM to the step alone (no B: in --signal); the script lives on and requeues."""
    settings = re.findall(r"^#SBATCH (.*)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append"} <= set(settings)
    script = slurm("wait")
    _until(lambda: _lines(tmp_path / "step"))
    os.kill(int(_lines(tmp_path / "step")[0]), signal.SIGTERM)
    assert script.wait(30) == 143
    assert _lines(tmp_path / "scontrol") == ["requeue 42"]


def test_slurm_is_not_requeued_when_cancelled(slurm, tmp_path):
    """scancel JOB sends SIGTERM to the batch script too."""
    script = slurm("wait")
    _until(lambda: _lines(tmp_path / "step"))
    script.send_signal(signal.SIGTERM)
    os.kill(int(_lines(tmp_path / "step")[0]), signal.SIGTERM)
    assert script.wait(30) == -signal.SIGTERM
    time.sleep(0.5)
    assert not _lines(tmp_path / "scontrol")


# Cloud TPU. The stand-in for gcloud keeps the resource's states, a line each, and runs the commands that come by ssh
# in one home directory per worker, where `codes` says how the training ends each time.
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
echo "$*" >>starts
code=$(head -n 1 codes); sed -i 1d codes
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
        return [len(_lines(home / "starts")) for home in self.workers]

    def verbs(self, *of: str) -> list[str]:
        verbs = [line.split()[3] for line in _lines(self.folder / "gcloud")]
        return [verb for verb in verbs if verb in of]


@pytest.fixture
def pod(tmp_path):
    """pod(codes, ...): a pod with a worker for each, whose trainings end with these codes, one after another."""
    missing = [name for name in ("flock", "setsid", "nohup") if not shutil.which(name)]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    train = _program(tmp_path / "bin", "train", _TRAIN)
    _program(tmp_path / "bin", "gcloud", _GCLOUD)
    _program(tmp_path / "bin", "sudo", '"$@"\n')
    _program(tmp_path / "bin", "git", 'case $1 in clone) mkdir "${@: -1}" ;; esac; echo "$*" >>"$HOME/git"\n')
    uv = f'[ "$1" = venv ] && mkdir -p .venv/bin && ln -s {train} .venv/bin/python; exit 0'
    _program(
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
        (["137 143 137 143 137 0"], 0, 6),  # a save begins a new row
    ],
)
def test_tpu_pod_restarts_by_exit_code(pod, codes, code, starts):
    it = pod(*codes)
    returned = it.run("run", "--config.steps=7", "--config.data.path=a b", MAX_CRASHES="2").wait(60)
    assert returned == code or (code == 134 and returned in (134, 137))
    assert it.starts() == [starts] * len(codes)
    expected = "-u -m llada_jax.train --config=configs/8b.py:v5p-4x4x8 --workdir=/w o/run --config.steps=7 "
    assert _lines(it.workers[0] / "starts")[0] == expected + "--config.data.path=a b"
    assert _lines(it.workers[0] / "git")[0] == "clone --quiet a repository llada_jax"
    assert it.verbs("create", "delete") == ["create"]


def test_tpu_pod_is_requested_anew_after_preemption(pod):
    it = pod("wait 0")
    run = it.run("run")
    _until(lambda: it.starts() == [1])
    os.kill(int(_lines(it.workers[0] / "pid")[0]), signal.SIGTERM)  # as the machine's shutdown does
    (it.folder / "states").write_text("SUSPENDING\nSUSPENDED\n")
    assert run.wait(60) == 0
    assert it.verbs("create", "delete") == ["create", "delete", "create"]
    assert it.starts() == [2]


def test_tpu_pod_request_that_failed(pod):
    it = pod("0")
    (it.folder / "states").write_text("FAILED\n")
    assert it.run("run").wait(30) == 1
    assert it.starts() == [0] and not it.verbs("create")


def test_tpu_pod_stops_and_joins(pod):
    it = pod("wait 0", "wait 0")
    watched = [it.run("run")]
    _until(lambda: it.starts() == [1, 1])
    # A second `run`, told apart by its zone, joins: it does not start a second training.
    watched.append(it.run("run", ZONE="z2"))
    _until(lambda: sum("ssh pod --zone=z2" in line for line in _lines(it.folder / "gcloud")) > 3)
    assert it.run("stop").wait(30) == 0
    assert [run.wait(60) for run in watched] == [143, 143]
    assert it.starts() == [1, 1]


def test_tpu_pod_says_how_to_use_it(pod):
    run = subprocess.run([LAUNCH / "tpu_pod.sh"], env={**os.environ, "ZONE": "z"}, capture_output=True, text=True)
    assert run.returncode == 2
    assert "launch/tpu_pod.sh run" in run.stdout and "set -euo" not in run.stdout


@pytest.mark.parametrize("flag", ["--node-count=2 --node-prefix=pod", "--node-id=pod"])
def test_tpu_pod_slices(pod, flag):
    it = pod()
    assert it.run("create", SLICES="2" if "count" in flag else "1", SPOT="").wait(30) == 0
    (line,) = _lines(it.folder / "gcloud")
    assert flag in line and "--spot" not in line and "--accelerator-type=v5p-256" in line
