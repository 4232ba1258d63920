"""Tests that --help describes every setting of the config tree, in the words of config.py."""

import dataclasses
import os
import re
import subprocess
import sys
import typing

import pytest
from paths import PYTHONPATH, ROOT

from llada_jax.cli import config_help
from llada_jax.config import Config, leaves

SOURCE = (ROOT / "llada_jax" / "config.py").read_text().splitlines()
LEAVES = dict(leaves(Config()))


def words_in_source(kind: type, field: str) -> list[str]:
    """Returns the words of a field's comment: those of the comment lines above it, then those behind it."""
    start = SOURCE.index(f"class {kind.__name__}:")
    at = next(i for i in range(start, len(SOURCE)) if SOURCE[i].startswith(f"    {field}: "))
    words = SOURCE[at].partition("  # ")[2].split()
    while SOURCE[at - 1].startswith("    # "):
        at -= 1
        words = SOURCE[at].removeprefix("    # ").split() + words
    return words


def fields(kind: type = Config, prefix: str = ""):
    """Yields (dotted name, dataclass, name of the field) for every setting."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind, field.name


def entries(text: str) -> dict[str, list[str]]:
    """Returns the lines of each setting's description in a rendered help, by the dotted name of the setting."""
    found = {}
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if match := re.match(r"  --config\.([\w.]+) \(", lines[0] if lines else ""):
            assert match[1] not in found
            found[match[1]] = lines
    return found


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_setting_is_described_in_the_words_of_its_comment(width):
    text = config_help.render(width)
    assert max(map(len, text.splitlines())) <= width
    described = entries(text)
    assert described.keys() == LEAVES.keys()
    for name, kind, field in fields():
        said = " ".join(described[name]).split()
        expected = words_in_source(kind, field)
        assert expected and said[-len(expected) :] == expected, name
        assert " ".join(said).startswith(f"--config.{name} (")
        assert f"default {LEAVES[name]!r})" in " ".join(said)


def test_settings_have_names_types_defaults_and_sections():
    found = {setting.name: setting for setting in config_help.settings()}
    assert {name: setting.default for name, setting in found.items()} == LEAVES
    assert all(name == f"{s.section}.{name.rpartition('.')[2]}".lstrip(".") for name, s in found.items())
    types = {name: found[name].type for name in ("steps", "report", "init_step", "data.weights", "model.lora.targets")}
    assert types == {
        "steps": "int",
        "report": "bool",
        "init_step": "int or None",
        "data.weights": "tuple of float",
        "model.lora.targets": "tuple of str",
    }
    assert found["optimizer.schedule"].type == "tuple of (float, float)"
    assert found["model.lora.rank"].section == "model.lora" and found["steps"].section == ""
    assert found["model.heads"].comment == "H: the number of query heads"


def test_every_section_has_its_docstring():
    text = " ".join(config_help.render(80).split())
    for section, kind in config_help.sections().items():
        title = f"config.{section}".rstrip(".")
        assert f" {title}: {' '.join(kind.__doc__.split())}" in text
    assert {"", "model", "model.lora", "optimizer", "distributed"} <= set(config_help.sections())


def test_a_list_in_a_comment_stays_a_list():
    (remat,) = (setting for setting in config_help.settings() if setting.name == "compute.remat")
    first, *items = remat.comment.splitlines()
    assert first.endswith("The others are computed again (remat).")
    assert [item.split()[0] for item in items] == ["none", "dots", "rotated", "attention", "full"]
    lines = entries(config_help.render(80))["compute.remat"]
    assert lines[-5:] == ["  " * 3 + item for item in items]
    # What does not fit on a line goes on below the meaning.
    start, going_on = entries(config_help.render(70))["compute.attention"][2:4]
    assert (
        start.startswith("        auto                the first")
        and going_on == " " * 28 + "that can run on the devices in use"
    )


def test_comments_with_text_before_and_behind_a_list():
    lines = ["Which one.", "  one    the first", "         of all", "  two    the second", "It is", "needed."]
    assert config_help._joined(lines) == "Which one.\n  one    the first of all\n  two    the second\nIt is needed."


def test_values_of_a_file_stand_beside_the_defaults():
    config = Config(steps=7)
    config.model.lora.rank = 4
    config.optimizer.schedule = ((0, 0.0), (2000.0, 1.0))  # a fraction of the run, where the default is a step
    config.model.rope_theta = 500_000  # the default is the same number as a float
    text = config_help.render(80, config, "configs/mine.py:x")
    described = {name: " ".join(" ".join(lines).split()) for name, lines in entries(text).items()}
    assert described["steps"].startswith("--config.steps (int, 7 in configs/mine.py:x, default 1000) the total")
    assert "(int, 4 in configs/mine.py:x, default 0)" in described["model.lora.rank"]
    assert "((0, 0.0), (2000.0, 1.0)) in configs/mine.py:x, default ((0, 0.0), (2000, 1.0))" in text.replace(
        "\n    ", " "
    )
    assert sum("configs/mine.py:x" in entry for entry in described.values()) == 3
    assert "The values of configs/mine.py:x are shown" in text.replace("\n", " ")


def helped(module: str, *arguments: str) -> subprocess.CompletedProcess:
    # A backend of this name cannot start, so the help starts none.
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "none_at_all", "COLUMNS": "50"}
    return subprocess.run(
        [sys.executable, "-m", f"llada_jax.{module}", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_help_of_the_commands_with_a_config():
    result = helped("train", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--workdir: " in result.stdout and result.stdout.startswith("Trains a model")
    assert entries(result.stdout) == entries(config_help.render(80))  # 80 columns in a pipe, whatever COLUMNS says

    result = helped("plan", "--config=configs/8b.py:v6e-8x8", "-h", "--config.optimizer.lr=1")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--topology: " in result.stdout
    assert "--config.compute.remat (str, 'attention' in configs/8b.py:v6e-8x8, default" in result.stdout


def test_forms_of_help():
    short, full = helped("train", "--helpshort"), helped("train", "--helpfull")
    assert (short.returncode, short.stderr, full.returncode, full.stderr) == (0, "", 0, "")
    assert "--workdir: " in short.stdout and "--config.steps" not in short.stdout
    assert "--verbosity: " in full.stdout.replace("-v,", "") and entries(full.stdout).keys() == LEAVES.keys()
    assert "--verbosity" not in short.stdout


def test_a_reader_that_leaves_early_is_no_mistake():
    command = f"{sys.executable} -m llada_jax.train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)
