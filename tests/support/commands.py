"""Runs the commands of the package in the process of a test, where JAX is imported and programs are compiled."""

import runpy
from collections.abc import Callable

import pytest
from absl import flags

from llada_jax.cli import model_flags, process_flags, sampler_flags  # noqa: F401 - they define flags once per process


@pytest.fixture
def command(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Returns command(NAME, *FLAGS), which runs `python -m llada_jax.NAME FLAGS`: (exit code, stdout, stderr)."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        known = flags.FLAGS._flags()
        before = {each: (flag, dict(vars(flag))) for each, flag in known.items()}
        for flag, _ in before.values():  # several commands define a flag of the same name
            flag.allow_override = True
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_module(f"llada_jax.{name}", run_name="__main__")
        finally:
            for flag in flags.FLAGS.flags_by_module_dict().get(name, ()):
                known.pop(flag.name, None)
            for each, (flag, state) in before.items():
                vars(flag).update(state)
                known[each] = flag
        return ended.value.code or 0, *capfd.readouterr()

    return run
