"""Keeps compiled programs on disk, so that a second start of the same command need not compile them again."""

import hashlib
import os
import platform
import sys
from pathlib import Path

from llada_jax.cli import paths

# Only programs that took at least this many seconds to compile are kept. 0 keeps all; a run compiles only few.
LEAST_COMPILE_TIME = 0.0


def default_folder() -> Path:
    """Returns the cache folder of this user for this kind of machine.

    Each kind of machine has its own folder, because a program compiled for one CPU may use instructions that another
    CPU lacks.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    caches = Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache"
    return caches / "llada_jax" / "xla" / hashlib.sha256(_machine().encode()).hexdigest()[:12]


def _machine() -> str:
    """Returns a description of the system and of the processor's features, as far as the system states them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.system()} {platform.machine()} {features}"


def enable() -> None:
    """Turns on JAX's compilation cache in `default_folder`, unless the user has configured it already.

    JAX_COMPILATION_CACHE_DIR=DIR selects another folder, and JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    Nothing happens in a process that has not imported jax. If the folder cannot be written to, one line is printed to
    stderr and programs are not cached.

    Raises:
      UserError: If JAX_COMPILATION_CACHE_DIR begins with ~USER and there is no such user.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given and given.startswith("~"):  # JAX would make a folder called ~
        os.environ["JAX_COMPILATION_CACHE_DIR"] = paths.expanded(given)
    if "jax" not in sys.modules:
        return
    import jax

    if given is not None:
        if jax.config.jax_compilation_cache_dir == given:
            jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        return
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_COMPILE_TIME)
