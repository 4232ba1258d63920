"""Tests that a leading ~ in a path stands for a home folder, in every flag and every setting that is a path."""

import ast
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import PYTHONPATH, ROOT

from llada_jax.cli import compilation_cache, config_help, paths
from llada_jax.cli.outputs import check_file, check_folder
from llada_jax.config import Config, UserError

# The flags and settings of type text that are no paths.
NO_PATHS = {
    "prompt", "system", "recipe", "dtype", "coordinator_address", "topology", "group_key", "text_key", "remasking",
    "attention", "remat", "commit", "revoke", "cache", "format", "naming", "tasks", "cases", "checkpoints", "shapes",
    "languages", "quality", "runner_options", "length",
    "load",  # like /load, which replaces ~ when it opens the file
}  # fmt: skip
NO_PATH_SETTINGS = {
    "compute.dtype", "compute.remat", "compute.attention", "diffusion.objective", "diffusion.t_sampling",
    "diffusion.loss_weight", "optimizer.name", "optimizer.state_dtype", "logging.wandb_project",
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("~/a/b", "HOME/a/b"), ("~", "HOME"), ("a/~/b", "a/~/b"), ("a~", "a~"), ("", ""), ("/x", "/x"),
        ("./~/x", "./~/x"), ("~root/x", "/root/x"), ("gs://b/~x", "gs://b/~x"), ("$X/x", "$X/x"),
    ],
)  # fmt: skip
def test_expanded(home, given, wanted):
    assert paths.expanded(given) == wanted.replace("HOME/", f"{home}/") if wanted != "HOME" else str(home)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=8) | st.text("~/. a$", max_size=8))
def test_any_text(path):
    """The result never begins with ~, and only what begins with ~ changes."""
    try:
        found = paths.expanded(path)
    except UserError as error:
        assert path.startswith("~") and str(error).startswith(f"{path}: there is no home folder ~")
        return
    assert not found.startswith("~") and (found == path or path.startswith("~"))


@pytest.mark.parametrize("path", ["~nobody_of_this_name/x", "~backup.txt", "~$doc", "~\0", "~\ud800/x"])
def test_a_home_folder_that_does_not_exist_is_refused(path, tmp_path, monkeypatch):
    """A folder with such a name would be made otherwise."""
    monkeypatch.chdir(tmp_path)
    for check in (paths.expanded, check_folder, check_file):
        with pytest.raises(UserError, match=r"there is no home folder ~.*write \./~"):
            check(path)
    assert os.listdir(tmp_path) == ["home"]


def test_settings(home):
    config = Config(init_from="~/m")
    config.data.path, config.data.input, config.data.cache = "~/a, gs://b/~c,~root/d", "~/*.txt,stdlib", "~/.c"
    config.data.tokenizer = "tok/~x"
    paths.expand_settings(config)
    assert config.data.path == f"{home}/a,gs://b/~c,/root/d" and config.data.input == f"{home}/*.txt,stdlib"
    assert (config.data.cache, config.init_from, config.data.tokenizer) == (f"{home}/.c", f"{home}/m", "tok/~x")
    config.data.path = "a,~nobody_of_this_name/b"
    with pytest.raises(UserError, match="^config.data.path=~nobody_of_this_name/b: there is no home folder"):
        paths.expand_settings(config)


def test_every_setting_that_is_a_text_is_known_to_be_a_path_or_not():
    texts = {setting.name for setting in config_help.settings() if setting.type == "str"}
    assert texts == {*paths.SETTINGS, *paths.LISTS} | NO_PATH_SETTINGS


def test_every_flag_that_is_a_path_is_defined_as_one():
    """Looks for DEFINE_string and its like in all programs, and for paths.define."""
    found = {"path": set(), "text": set()}
    for file in [*(ROOT / "llada_jax").glob("*.py"), *(ROOT / "llada_jax" / "cli").glob("*.py"),
                 *(ROOT / "benchmarks").glob("*.py")]:  # fmt: skip
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = getattr(node.func.value, "id", "")
            kind = {"flags": "text", "paths": "path"}.get(owner)
            if kind and node.func.attr in (
                "DEFINE_string",
                "DEFINE_multi_string",
                "DEFINE_list",
                "define",
                "define_multi",
            ):
                if isinstance(node.args[0], ast.Constant):
                    found[kind].add(node.args[0].value)
    assert found["text"] <= NO_PATHS
    wanted = "workdir model output input tokenizer prompts include_path data results_cache hlo set profile".split()
    assert found["path"] >= {*wanted, "decontaminate"}


def test_the_config_file(home):
    words = ["train", "--config=~/a.py:x", "-config", "~/b.py", "--workdir=~/w", "--", "--config=~/c"]
    assert paths.expand_config_flag(words) == [
        "train", f"--config={home}/a.py:x", "-config", f"{home}/b.py", "--workdir=~/w", "--", "--config=~/c"
    ]  # fmt: skip


def test_a_real_command_writes_to_the_home_folder(home, tmp_path):
    (home / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    place = tmp_path / "place"
    place.mkdir()
    flags = ["--input=~/text.txt", "--output=~/sets/a", "--train_tokenizer=300", "--sequence_length=32"]
    flags += ["--workers=1", "--validation_fraction=0"]
    done = subprocess.run(
        [sys.executable, "-m", "llada_jax.prepare", *flags], cwd=place, capture_output=True, text=True, check=False,
        env=os.environ | {"HOME": str(home), "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (home / "sets" / "a" / "manifest.json").exists() and os.listdir(place) == []
    done = subprocess.run(
        [sys.executable, "-m", "llada_jax.prepare", "--input=x", "--output=~nobody_of_this_name/a"],
        cwd=place, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no home folder ~nobody" in done.stderr
    assert os.listdir(place) == []


def test_the_folder_of_jaxs_compilation_cache(home, monkeypatch):
    import jax

    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/programs")
        jax.config.update("jax_compilation_cache_dir", "~/programs")  # JAX reads the variable when it is imported
        compilation_cache.enable()
        assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"] == f"{home}/programs"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
