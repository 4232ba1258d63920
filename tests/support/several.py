"""A training process that does something at a chosen point.

    python tests/support/several.py POINT WHO STEP -- FLAGS OF TRAIN

Only process WHO of several does it, as soon as step STEP is dispatched: "raise" (an exception), "terminate"
(SIGTERM to itself). "saving": kill -9 while it writes its part of checkpoint STEP.
"other": it has another seed than the others. "nothing": nothing.

Every process notes in WORKDIR.PROCESS which rows it reads, "rows STEP [...]", and which files of the workdir it opens
to write, "writes NAME".
"""

import os
import signal
import sys
import time
from pathlib import Path

import dying


def main() -> None:
    """Arms the chosen point, then trains."""
    point, who, step = sys.argv[1 : sys.argv.index("--")]
    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    folder = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--workdir="))
    process = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--process_id="))
    if process != who:
        point = "nothing"
    notes = os.open(f"{folder}.{process}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    from llada_jax import train
    from llada_jax.cli import entry_point
    from llada_jax.data.read import pipeline
    from llada_jax.training import checkpoint, loop

    dispatch, batch = loop.Loop._step, pipeline.TrainingData.batch

    def tell(line: str) -> None:
        os.write(notes, f"{line}\n".encode())  # in one piece, whatever other threads do

    def told_batch(self, at, rows):
        tell(f"rows {at} {list(rows)}")
        return batch(self, at, rows)

    def step_and_act(self, *args):
        state = dispatch(self, *args)
        if self.done == int(step):
            if point == "raise":
                raise RuntimeError("a step that fails")
            elif point == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
        if point == "terminate" and self.done >= int(step):
            time.sleep(1)  # small steps would be over before the processes have agreed on one
        return state

    def told_open(event, args):
        if event == "open" and isinstance(args[0], str) and args[0].startswith(folder + "/") and args[2] & os.O_ACCMODE:
            tell(f"writes {os.path.relpath(args[0], folder)}")

    pipeline.TrainingData.batch = told_batch
    loop.Loop._step = step_and_act
    sys.addaudithook(told_open)
    if point == "saving":
        dying.die_when_written(Path(folder) / checkpoint.FOLDER, int(step))
    if point == "other":
        sys.argv.append("--config.seed=5")
    entry_point.run(train.main)


if __name__ == "__main__":
    main()
