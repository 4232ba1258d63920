"""Tests that the help of the sampler's flags names the defaults of the command that shows it, and no other's."""

import os
import subprocess
import sys

import pytest
from absl import flags
from paths import PYTHONPATH

from llada_jax.cli import sampler_flags
from llada_jax.conversation.conversation import Settings
from llada_jax.sampling import text_completion
from llada_jax.sampling.commit import RULES
from llada_jax.sampling.settings import REVOKE_BOUNDS
from llada_jax.sampling.text_completion import Options

NAMES = {flag.name for flag in sampler_flags._FLAGS}


def default(name: str, command: str) -> str:
    return sampler_flags.describe(name, command).partition("Default: ")[2].removesuffix(".")


@pytest.mark.parametrize("command", ["sample", "chat", "evaluate"])
def test_every_flag_names_a_default_of_one_command_only(command):
    for name in NAMES:
        text = sampler_flags.describe(name, command)
        assert text.count("Default: ") == 1 and default(name, command)
        assert not any(other in text for other in sampler_flags.DEFAULTS)


def test_the_defaults_are_those_of_the_commands():
    for command, options in (("sample", Options()), ("chat", Settings())):
        values = {name: getattr(options, name, 0) for name in NAMES}
        assert values.pop("steps") is None and default("steps", command) == "one for each token"
        length = values.pop("gen_length")
        bounds = ", ".join(f"{rule.bound:g}" for rule in RULES.values())
        assert values.pop("commit_bound") is None
        assert default("commit_bound", command) == f"{bounds}, in the order of the rules"
        bounds = ", ".join(f"{bound:g}" for bound in REVOKE_BOUNDS.values())
        assert values.pop("revoke_bound") is None
        assert default("revoke_bound", command) == f"{bounds}, in the order of the rules"
        assert default("gen_length", command).split(",")[0] == str(length or text_completion.DEFAULTS.gen_length)
        words = {name: value if isinstance(value, str) else f"{value:g}" for name, value in values.items()}
        words |= {name: str(value).lower() for name, value in values.items() if isinstance(value, bool)}
        assert words == {name: default(name, command) for name in values}


def test_the_defaults_of_evaluate():
    generation = pytest.importorskip("llada_jax.evaluation.generation", reason="needs lm_eval")
    from llada_jax.evaluation import reversal

    assert f"or {generation.DEFAULT_GEN_LENGTH}; {reversal.GEN_LENGTH} for" in default("gen_length", "evaluate")
    assert default("block_length", "evaluate").endswith(f"or {Options().block_length}")


def test_a_program_that_is_no_command_names_no_default():
    assert {flags.FLAGS[name].help for name in NAMES} == {sampler_flags.describe(name, "") for name in NAMES}
    assert "Default" not in sampler_flags.describe("gen_length", "pytest")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("sample", "until the text ends (--length=append). Default: 64, or 0 if the prompt has [MASK] in it."),
        ("chat", "or auto: blocks until it ends (--length=append). Default: 128."),
        ("evaluate", "Default: the number of the recipe or the task, or 256; 28 for --tasks=reversal."),
    ],
)
def test_help_of_the_real_command(command, shown):
    result = subprocess.run(
        [sys.executable, "-m", f"llada_jax.{command}", "--help"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert shown in " ".join(result.stdout.split())
