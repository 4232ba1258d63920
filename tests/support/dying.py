"""A training process that kills itself at a chosen point: python tests/support/dying.py POINT [STEP] -- FLAGS OF TRAIN

The process dies when it has reached POINT:
  publish     the prepared set is complete but still has a temporary name
  config      config.json is about to be written
  started     the first step is about to run
  dispatched  step STEP runs on the device
  written     the metrics of STEP are in metrics.jsonl
  saving      files of checkpoint STEP are being written
  aside       a damaged checkpoint is about to be renamed
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name: str, when=lambda *_: True) -> None:
    """Makes the process die instead of calling owner.name, the first time that `when` is true for its arguments."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        if when(*args):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, call)


def die_when_written(checkpoints: Path, step: int) -> None:
    """Makes the process die as soon as the unfinished checkpoint has a file that is not empty."""

    def watch() -> None:
        while True:
            for folder in checkpoints.glob(f"{step}.*tmp*"):
                if any(file.is_file() and file.stat().st_size for file in folder.rglob("*")):
                    die()
            time.sleep(0.0005)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Prepares the process to die at the chosen point, then trains."""
    point, *step = sys.argv[1 : sys.argv.index("--")]
    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    step = int(step[0]) if step else None
    from llada_jax import train
    from llada_jax.cli import entry_point
    from llada_jax.data.prepare import prepare_text
    from llada_jax.formats import workdir
    from llada_jax.training import loop, metrics

    if point == "publish":
        before(prepare_text, "publish")
    elif point == "config":
        before(workdir, "write_config")
    elif point == "started":
        before(loop.Loop, "_step")
    elif point == "dispatched":
        before(loop.Loop, "_between_steps", lambda this, _: this.done == step)
    elif point == "written":
        write = metrics.Writer.write

        def write_and_die(self, at, values):
            write(self, at, values)
            if at >= step:
                die()

        metrics.Writer.write = write_and_die
    elif point == "saving":
        folder = next(Path(a.split("=", 1)[1]) for a in sys.argv if a.startswith("--workdir="))
        die_when_written(folder / workdir.CHECKPOINTS, step)
    elif point == "aside":
        before(Path, "rename", lambda _, target: "damaged" in str(target))
    else:
        raise SystemExit(f"unknown point {point}")
    entry_point.run(train.main)


if __name__ == "__main__":
    main()
