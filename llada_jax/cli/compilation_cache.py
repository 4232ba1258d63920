"""Compiled programs are kept on disk: a second start of the same command does not compile again."""

import hashlib
import os
import platform
import sys
from pathlib import Path

# Seconds that a program must have taken to compile to be kept; 0 = all: the start of a run compiles few.
LEAST_COMPILE_TIME = 0.0


def default_folder() -> Path:
    """Of this user and this kind of machine: a program compiled for a CPU may use instructions that another lacks."""
    root = os.environ.get("XDG_CACHE_HOME")
    caches = Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache"
    return caches / "llada_jax" / "xla" / hashlib.sha256(_machine().encode()).hexdigest()[:12]


def _machine() -> str:
    """What the processor can do, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.system()} {platform.machine()} {features}"


def enable() -> None:
    """Turns the cache on, in `default_folder`, unless the user has said something about it to JAX.

    JAX_COMPILATION_CACHE_DIR=DIR puts it elsewhere, JAX_ENABLE_COMPILATION_CACHE=false turns it off. A process that
    has not imported jax needs none. If the folder cannot be written, there is one line on stderr and no cache.
    """
    if "jax" not in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_COMPILE_TIME)
