"""Tests that a user's mistake on the command line leads to one line on stderr that names it, and to exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags, logging
from ml_collections import config_flags
from paths import PYTHONPATH

from llada_jax.cli import entry_point
from llada_jax.config import Config, UserError

GOOD = """
from llada_jax.config import Config
def get_config():
    c = Config(steps=3)
    c.data.input = "stdlib"
    return c
"""
BAD = {
    "name.py": ("def get_config():\n    return Confg(steps=3)\n", "NameError: name 'Confg' is not defined", 2),
    "import.py": ("import no_such_module_here\n", "No module named 'no_such_module_here'", 1),
    "attribute.py": (
        GOOD.replace("c.data.input", "c.optimizer.lr"),
        "has no attribute 'lr'; did you mean config.optimizer.peak_learning_rate? (",
        5,
    ),
    "argument.py": (
        GOOD.replace("steps=3", "stepz=3"),
        "unexpected keyword argument 'stepz'; did you mean config.steps? (",
        4,
    ),
    "value.py": ("def get_config():\n    x = 1\n    return int('boom')\n", "'boom'", 3),
    "key.py": ("def get_config():\n    return {}['which']\n", "KeyError: which", 2),
    "zero.py": ("def get_config():\n    return 1 / 0\n", "division by zero", 2),
    "syntax.py": ("def get_config(:\n", "invalid syntax", 1),
}


def start(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "llada_jax.train", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["--config=good.py", "--config.optimizer.lr=1", "--workdir=w"],
            "--config.optimizer.lr: there is no such setting; did you mean --config.optimizer.peak_learning_rate?",
        ),
        (["--config=good.py", "--config.model.heads=3", "--workdir=w"], "config.model.heads=3"),
    ],
)
def test_the_real_command(tmp_path, arguments, named):
    (tmp_path / "good.py").write_text(GOOD)
    result = start(*arguments, folder=tmp_path)
    assert result.returncode == entry_point.USER_ERROR == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert named in result.stderr
    assert not (tmp_path / "w").exists()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns run(*arguments, main=...), which calls `entry_point.run` in tmp_path with flags like those of train.

    It returns the exit code, stdout, and the lines on stderr.
    """
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text(GOOD)
    for name, (text, _, _) in BAD.items():
        (tmp_path / name).write_text(text)
    seen = []

    def default_main():
        seen.append((entry_point.config_of(config), workdir.value))

    def call(*arguments, main=default_main):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])  # ml_collections looks for overrides in sys.argv
        sys.modules.pop("config_config", None)  # ml_collections keeps the module of the previous config file
        with pytest.raises(SystemExit) as left:
            entry_point.run(main, ["train", *arguments])
        out, err = capsys.readouterr()
        return left.value.code, out, err.splitlines()

    call.seen = seen
    verbosity = logging.get_verbosity()
    yield call
    logging.set_verbosity(verbosity)


def test_overrides_arrive_with_their_types(run):
    code, _, errors = run(
        "--config=good.py", "--workdir=w", "--config.optimizer.schedule=((0,0.0),(20,1.0),(0.5,1))",
        "--config.optimizer.peak_learning_rate=1", "--config.report=true", "--config.model.mask_id=5",
        "--config.data.weights=(1,2.5)", "--config.sampling.prompts=('a b','c')", "--config.data.input=x,y",
    )  # fmt: skip
    assert (code or 0, errors) == (0, [])
    config, workdir = run.seen[0]
    assert isinstance(config, Config) and workdir == "w" and config.steps == 3
    assert config.optimizer.schedule == ((0, 0.0), (20, 1.0), (0.5, 1))
    assert [type(p) for p, _ in config.optimizer.schedule] == [int, int, float]
    assert config.optimizer.peak_learning_rate == 1 and config.report is True and config.model.mask_id == 5
    assert config.data.weights == (1, 2.5) and config.sampling.prompts == ("a b", "c") and config.data.input == "x,y"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["--config=good.py", "--config.stepz=1"],
            "--config.stepz: there is no such setting; did you mean --config.st",
        ),
        (["--config=good.py", "--config.model.layer=1"], "did you mean --config.model.layers?"),
        (["--config=good.py", "--config.steps=2", "--noconfig.reprot"], "did you mean --config.report?"),
        (["--config=good.py", "--config.batch-size=2"], "did you mean --config.batch_size?"),
        (["--config=good.py", "--config.steps.x=2"], "did you mean --config.steps?"),
        (["--config=good.py", "--config.optimiser.lr=2"], "did you mean --config.optimizer.peak_learning_rate?"),
        (["--config=good.py", "--config.model.lora.dropout=1"], "config.model.lora has the settings rank, alpha, tar"),
        (["--config=good.py", "--config.workdir=w"], "did you mean --workdir?"),
        (["--config=good.py", "--config.steps=abc"], "--config.steps=abc"),
        (["--config=good.py", "--config.steps=1.5"], "--config.steps=1.5"),
        (["--config=good.py", "--config.optimizer.beta1=x"], "--config.optimizer.beta1=x"),
        (["--config=good.py", "--config.report=maybe"], "--config.report=maybe"),
        (["--config=good.py", "--config.model=3"], "--config.model is a section and has no value of its own"),
        (["--config=good.py", "--config.optimizer=adamw"], "config.optimizer has the settings name, peak_learning_rat"),
        (["--config=good.py", "--config.model.lora=0"], "--config.model.lora is a section"),
        (["--config=good.py", "--output_dir=w"], "did you mean --workdir?"),
        (["--config=good.py", "--config.output_dir=w"], "did you mean --workdir?"),
        (["--config=good.py", "--confg.steps=3"], "'confg.steps'; did you mean --config.steps?"),
        (["--config=good.py", "--steps=3"], "'steps'; did you mean --config.steps?"),
        (["--config=good.py", "--wrokdir=w"], "'wrokdir'. Did you mean: workdir ?"),
        (["--config.steps=3"], "--config=FILE is missing: pass a config file in front of --config.steps"),
        (["--config=good.py", "extra"], "'extra'"),
        (["--workdir=w"], "--config=FILE is missing"),
        (["--config=missing.py"], "missing.py"),
        (["--config=missing.py", "--config.steps=3"], "missing.py"),
        (["--config=missing.py", "--config.stepz=3"], "missing.py"),
        (["--config=good.py:variant"], "get_config()"),
    ],
)
def test_wrong_flag(run, arguments, named):
    code, out, errors = run(*arguments)
    assert code == 2 and out == "" and len(errors) == 1 and not run.seen
    assert errors[0].startswith("error: ") and named in errors[0] and "Traceback" not in errors[0]


@pytest.mark.parametrize("name", BAD)
def test_mistake_in_a_config_file(run, name):
    """The error names the message and the line in the config file, whatever the exception is."""
    _, message, line = BAD[name]
    code, out, errors = run(f"--config={name}")
    assert code == 2 and out == "" and len(errors) == 1
    assert errors[0].startswith("error: --config: ") and message in errors[0] and "Traceback" not in errors[0]
    assert errors[0].endswith(f"{name}, line {line})")


def test_help_shows_the_values_of_a_config_file(run):
    code, out, errors = run("--config", "zero.py", "--config=good.py", "--config.steps=5", "--help")
    assert (code, errors) == (0, []) and not run.seen
    assert "--config.steps (int, 3 in good.py, default 1000)" in out
    code, out, errors = run("--help")
    assert (code, errors) == (0, []) and "--config.steps (int, default 1000)" in out and "good.py" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--help", "--config=missing.py"], "error: --config=missing.py: "),
        (["--config", "zero.py", "--help"], "error: --config: ZeroDivisionError: division by zero ("),
        (["--config=none.py", "-h"], "error: get_config() in the --config file must return a llada_jax.config.Config"),
    ],
)
def test_help_with_a_config_file_that_cannot_be_shown(run, tmp_path, arguments, message):
    (tmp_path / "none.py").write_text("def get_config():\n    return {}\n")
    code, out, errors = run(*arguments)
    assert (code, out, len(errors)) == (2, "", 1) and errors[0].startswith(message)


def test_there_is_no_help_behind_two_dashes(run):
    code, _, errors = run("--config=good.py", "--", "--help")
    assert code == 2 and errors == ["error: unexpected argument '--help': pass every setting as a flag, --name=value"]


@pytest.mark.parametrize("text", ["def get_config():\n    return {'steps': 3}\n", "def get_config():\n    pass\n"])
def test_config_file_that_returns_something_else(run, tmp_path, text):
    (tmp_path / "other.py").write_text(text)
    code, _, errors = run("--config=other.py")
    assert code == 2 and len(errors) == 1 and "Config" in errors[0]


def test_config_file_without_get_config(run, tmp_path):
    (tmp_path / "other.py").write_text("config = 1\n")
    code, _, errors = run("--config=other.py")
    assert code == 2 and len(errors) == 1 and "get_config" in errors[0]


def test_user_error_of_a_config_file_stays_as_it_is(run, tmp_path):
    text = "from llada_jax.config import UserError\ndef get_config(arg):\n    raise UserError('no variant ' + arg)\n"
    (tmp_path / "variant.py").write_text(text)
    assert run("--config=variant.py:abc") == (2, "", ["error: no variant abc"])


def test_message_of_several_lines_becomes_one(run):
    def main():
        raise UserError("config.steps=0\n  must be at least 1")

    assert run("--config=good.py", main=main) == (2, "", ["error: config.steps=0 must be at least 1"])


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), OSError("x"), AttributeError("x")])
def test_a_fault_of_the_program_keeps_its_traceback(run, error):
    """Such an exception is not a user's mistake and must not be reported like one."""

    def main():
        raise error

    with pytest.raises(type(error)):
        entry_point.run(main, ["train", "--config=good.py"])


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (143, 143)])
def test_exit_code_of_main(run, returned, code):
    assert (run("--config=good.py", main=lambda: returned)[0] or 0) == code


def test_interrupt(run):
    def main():
        raise KeyboardInterrupt

    assert run("--config=good.py", main=main) == (130, "", ["interrupted"])
