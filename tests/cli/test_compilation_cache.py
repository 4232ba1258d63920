"""Tests the folder in which compiled programs are kept, and the cases in which they are not kept."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llada_jax
from llada_jax.cli import compilation_cache

SCRIPT = """
import jax
from llada_jax.cli import compilation_cache
compilation_cache.enable()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache)
print(float(jax.jit(lambda x: (x * 3).sum())(jax.numpy.arange(5.0))))
"""


def start(script: str, **settings: str) -> subprocess.CompletedProcess:
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | settings
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_programs_are_kept_and_taken_again(tmp_path):
    first = start(SCRIPT, XDG_CACHE_HOME=str(tmp_path))
    folder = Path(first.stdout.split()[0])
    assert folder.parent == tmp_path / "llada_jax" / "xla"
    kept = {file for file in folder.rglob("*-cache")}
    assert kept
    second = start(SCRIPT, XDG_CACHE_HOME=str(tmp_path))
    assert (second.stdout, second.stderr) == (first.stdout, first.stderr)
    assert {file for file in folder.rglob("*-cache")} == kept


@pytest.mark.parametrize(
    ("settings", "folder"),
    [({"JAX_COMPILATION_CACHE_DIR": "{tmp_path}/own"}, "{tmp_path}/own"), ({"JAX_COMPILATION_CACHE_DIR": ""}, None)],
)
def test_what_the_user_says_to_jax_stands(tmp_path, settings, folder):
    settings = {name: value.format(tmp_path=tmp_path) for name, value in settings.items()}
    done = start(SCRIPT, XDG_CACHE_HOME=str(tmp_path / "default"), **settings)
    assert done.stdout.splitlines()[0].split()[0] in (
        {folder.format(tmp_path=tmp_path)} if folder else {"None", "True"}
    )
    assert not (tmp_path / "default").exists()


def test_turned_off(tmp_path):
    done = start(SCRIPT, XDG_CACHE_HOME=str(tmp_path / "default"), JAX_ENABLE_COMPILATION_CACHE="false")
    assert done.stdout.splitlines()[0] == "None False"
    assert not (tmp_path / "default").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = start(SCRIPT, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.stdout.splitlines() == ["None True", "30.0"]
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("compiled programs are not kept: ")


def test_without_jax_nothing_is_made(tmp_path):
    start(
        "from llada_jax.cli import compilation_cache; compilation_cache.enable()", XDG_CACHE_HOME=str(tmp_path / "none")
    )
    assert not (tmp_path / "none").exists()


IMPORTING = """
from llada_jax.cli import entry_point
def main():
    with entry_point.importing():
        import jax
    print(jax.config.jax_compilation_cache_dir)
entry_point.run(main)
"""


def test_an_entry_point_that_imports_jax_late_keeps_programs_too(tmp_path):
    done = start(IMPORTING, XDG_CACHE_HOME=str(tmp_path))
    assert Path(done.stdout.strip()).parent == tmp_path / "llada_jax" / "xla"


@pytest.mark.parametrize("name", ["train", "sample", "chat", "evaluate", "convert"])
def test_entry_points_import_jax_late(name):
    start(f"import sys, llada_jax.{name}; assert 'jax' not in sys.modules")
    tree = ast.parse(Path(llada_jax.__file__).with_name(f"{name}.py").read_text())
    (late,) = (node for node in ast.walk(tree) if isinstance(node, ast.With))
    assert ast.unparse(late.items[0]) == "entry_point.importing()"
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node for node in imports if node not in tree.body] == [node for node in late.body if node in imports]


def test_machines_of_other_kinds_have_folders_of_their_own(monkeypatch):
    here = compilation_cache.default_folder()
    assert compilation_cache.default_folder() == here
    monkeypatch.setattr(compilation_cache, "_machine", lambda: "another")
    assert compilation_cache.default_folder() != here
