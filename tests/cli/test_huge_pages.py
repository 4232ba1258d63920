"""A process replaces itself by one with huge pages, once, and only where this helps."""

import os
import subprocess
import sys

import pytest

from llada_jax.cli import huge_pages

PROGRAM = """
import os, sys
from pathlib import Path
from llada_jax.cli import huge_pages
huge_pages.KERNEL = Path(sys.argv[1])
print("started", os.getpid(), flush=True)
huge_pages.restart()
print(os.getpid(), sys.argv[2:], sys.flags.utf8_mode, os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.fixture
def glibc():
    name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "none 0").split()
    if name != "glibc" or huge_pages._numbers(version) < (2, 35):
        pytest.skip("needs glibc 2.35")


def run(tmp_path, kernel: str, **variables: str) -> tuple[list[str], str]:
    (tmp_path / "enabled").write_text(kernel)
    environment = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "JAX_PLATFORMS")} | variables
    command = [sys.executable, "-X", "utf8", "-c", PROGRAM, str(tmp_path / "enabled"), "a b", "--c=d"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines(), done.stderr


def test_restarts_once_with_the_same_command(glibc, tmp_path):
    (first, second, last), said = run(tmp_path, "always [madvise] never\n")
    pid = first.split()[1]
    assert first == second  # the same process id
    assert last == f"{pid} ['a b', '--c=d'] 1 glibc.malloc.hugetlb=1"
    assert said.startswith("starting again with GLIBC_TUNABLES=") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("kernel", "variables"),
    [
        ("[always] madvise never\n", {}),
        ("always madvise [never]\n", {}),
        ("always [madvise] never\n", {"GLIBC_TUNABLES": ""}),
        ("always [madvise] never\n", {"JAX_PLATFORMS": "cuda"}),
    ],
)
def test_does_not_restart_otherwise(glibc, tmp_path, kernel, variables):
    (_, last), said = run(tmp_path, kernel, **variables)
    assert last.endswith(str(variables.get("GLIBC_TUNABLES"))) and not said
