"""Tests the files in launch/: they are well-formed, and restarts follow the exit codes.

Stand-ins replace the programs of the clusters.
"""

import ast
import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from paths import ROOT
from standins import lines, program, until

from llada_jax.config import Config, leaves

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


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
    # Exec form, because a shell in between would not forward SIGTERM to the training.
    assert ast.literal_eval(last["ENTRYPOINT"]) == ["tini", "--"]
    assert ast.literal_eval(last["CMD"])[:3] == ["python", "-m", "llada_jax.train"]
    assert last["USER"] not in ("root", "0")
    for name, value in steps:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in value.split()[:-1]), value


# The fields that launch/gke.yaml may use, from the JobSet API jobset.x-k8s.io/v1alpha2 (release 0.10) and batch/v1.
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
    assert pod["restartPolicy"] == "Never"  # A podFailurePolicy requires this.
    (container,) = pod["containers"]
    assert "command" not in container  # `command` would replace the image's entry point, which forwards SIGTERM.
    assert container["args"][:3] == ["python", "-m", "llada_jax.train"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # The Job has as many pods as the slice has hosts.
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
    """Follows the two levels of restart rules as the controllers of the Job and of the JobSet do."""
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
    assert action == "RestartJobSet"  # the default action, limited by maxRestarts


def test_kubectl_reads_the_pods(jobset, tmp_path):
    """Lets kubectl decode the Job, which checks the types of its fields.

    The flag --local works without a server, whereas --dry-run=client would contact one.
    """
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": _job(jobset)}
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "none")}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    change = ["set", "image", "train=x", "--local", "-f", path, "-o", "name"]
    subprocess.run(["kubectl", *change], check=True, env=environment)


def _check_training(words: list[str]) -> None:
    """Checks that the flags of a training exist, and that its data and its workdir lie in a bucket."""
    given = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    settings = {f"config.{name}" for name, _ in leaves(Config())}
    known = {"config", "workdir", "coordinator_address", "num_processes", "process_id"} | settings
    assert set(given) <= known, set(given) - known
    assert {given[name].partition("://")[0] for name in ("workdir", "config.data.path")} == {"gs"}
    assert (ROOT / given["config"].partition(":")[0]).is_file()


def test_the_jobset_needs_no_disk_that_is_shared(jobset):
    pod = _job(jobset)["template"]["spec"]
    _check_training(pod["containers"][0]["args"])
    assert [set(volume) - {"name"} for volume in pod["volumes"]] == [{"emptyDir"}]


# SkyPilot. The fields are those of its task files, release 0.14.
_TASK = {"name", "resources", "num_nodes", "workdir", "envs", "secrets", "file_mounts", "setup", "run", "config"}
_RESOURCES = {
    "infra", "accelerators", "accelerator_args", "cpus", "memory", "use_spot", "disk_size", "disk_tier", "image_id",
    "job_recovery", "any_of", "ordered", "network_tier",
}  # fmt: skip


@pytest.fixture
def task() -> dict:
    return yaml.safe_load((LAUNCH / "sky.yaml").read_text())


def test_sky_task(task, tmp_path):
    assert set(task) <= _TASK and set(task["resources"]) <= _RESOURCES
    for name in ("setup", "run"):
        script = tmp_path / f"{name}.sh"
        script.write_text(f"#!/bin/bash\n{task[name]}")
        subprocess.run(["bash", "-n", script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--exclude=SC2154", script], check=True)
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"]))
    known = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SECONDS", *task["envs"]}
    assert used <= known, used - known
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(task["envs"]["EXTRAS"].split(",")) <= set(setup["options.extras_require"])


@pytest.mark.parametrize(
    "ended, steady, code",
    [(0, 0, 0), (1, 0, 1), (2, 0, 2), (130, 0, 130), (143, 900, 75), (134, 0, 75), (137, 0, 75), (137, 900, 137)],
)
def test_sky_starts_again_by_exit_code(task, tmp_path, ended, steady, code):
    """The job starts again after 75, and after no other exit code."""
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    program(tmp_path / ".venv/bin", "python", f'printf "%s\\n" "$@" >flags; exit {ended}\n')
    envs = {name: str(value) for name, value in task["envs"].items()} | {"BUCKET": "b", "STEADY_SECONDS": str(steady)}
    envs |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=os.environ | envs, check=False)
    assert done.returncode == code
    flags = lines(tmp_path / "flags")
    _check_training(flags)
    assert {"--coordinator_address=10.0.0.1:8476", "--num_processes=2", "--process_id=1"} <= set(flags)


# Slurm. The stand-in for srun prints and returns what the real srun does for tasks that end with the codes in $TASKS.
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
    """Returns slurm(tasks, **environment), which starts slurm.sh with processes that end with these codes."""
    program(tmp_path / "bin", "srun", _SRUN)
    program(tmp_path / "bin", "scontrol", 'echo "$*" >>"$RECORD/scontrol"\n')

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
        ("2 134", 2, False),  # One process found a mistake of the user; its peer then aborted.
        ("134 1 137", 1, False),
        ("143 143", 143, True),
        ("134 134", 134, True),
        ("0 137", 137, True),
        ("127 127", 127, False),
        ("130 130", 130, False),
    ],
)
def test_slurm_requeues_by_exit_code(slurm, tmp_path, tasks, code, again):
    assert slurm(tasks).wait(120) == code
    assert lines(tmp_path / "scontrol") == ["requeue 42"] * again
    (command,) = lines(tmp_path / "srun")
    assert command.endswith(
        f"python -u -m llada_jax.train --config=configs/8b.py:16xh100-8 --workdir={tmp_path / 'run'} --config.steps=7"
    )
    assert "--cpus-per-task=3" in command and "--kill-on-bad-exit=0" in command


def test_slurm_gives_up_after_crashes_in_a_row(slurm, tmp_path):
    def requeued(tasks: str, **environment: str) -> bool:
        before = len(lines(tmp_path / "scontrol"))
        slurm(tasks, MAX_CRASHES="2", **environment).wait(120)
        return len(lines(tmp_path / "scontrol")) > before

    assert [requeued("134") for _ in range(3)] == [True, True, False]
    assert requeued("143") and requeued("137") and requeued("134")  # A save resets the count.
    assert not requeued("134")
    assert requeued("134", STEADY_SECONDS="0")  # A start that lasted long enough also resets it.


def test_slurm_saves_before_the_time_limit(slurm, tmp_path):
    """Slurm sends SIGTERM only to the job step (--signal has no "B:"), so the script continues and requeues the job."""
    settings = re.findall(r"^#SBATCH (.*)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append"} <= set(settings)
    script = slurm("wait")
    until(lambda: lines(tmp_path / "step"))
    os.kill(int(lines(tmp_path / "step")[0]), signal.SIGTERM)
    assert script.wait(120) == 143
    assert lines(tmp_path / "scontrol") == ["requeue 42"]


def test_slurm_is_not_requeued_when_cancelled(slurm, tmp_path):
    """scancel JOB also sends SIGTERM to the batch script, which must not requeue the job."""
    script = slurm("wait")
    until(lambda: lines(tmp_path / "step"))
    script.send_signal(signal.SIGTERM)
    os.kill(int(lines(tmp_path / "step")[0]), signal.SIGTERM)
    assert script.wait(120) == -signal.SIGTERM
    time.sleep(0.5)
    assert not lines(tmp_path / "scontrol")
