"""A training process that kills itself at a chosen point: python tests/support/dying.py POINT [STEP] -- FLAGS OF TRAIN

Points: "publish" (the prepared set is complete but has no name yet), "config" (before config.json is written),
"started" (before the first step), "dispatched" (step STEP runs on the device), "written" (the metrics of STEP are
in metrics.jsonl), "saving" (files of checkpoint STEP are being written), "aside" (a damaged checkpoint is renamed).
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
    """Dies in place of calling owner.name, the first time `when` holds for its arguments."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        if when(*args):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, call)


def die_when_written(checkpoints: Path, step: int) -> None:
    """Dies as soon as there is a file with content in the unfinished checkpoint."""

    def watch() -> None:
        while True:
            for folder in checkpoints.glob(f"{step}.*tmp*"):
                if any(file.is_file() and file.stat().st_size for file in folder.rglob("*")):
                    die()
            time.sleep(0.0005)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Arms the chosen point, then trains."""
    point, *step = sys.argv[1 : sys.argv.index("--")]
    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    step = int(step[0]) if step else None
    from llada_jax import train
    from llada_jax.cli import entry_point
    from llada_jax.data.prepare import prepare_text
    from llada_jax.training import checkpoint, loop, metrics, workdir

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
        die_when_written(folder / checkpoint.FOLDER, step)
    elif point == "aside":
        before(Path, "rename", lambda _, target: "damaged" in str(target))
    else:
        raise SystemExit(f"no point {point}")
    entry_point.run(train.main)


if __name__ == "__main__":
    main()
