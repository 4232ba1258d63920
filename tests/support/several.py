"""One of several training processes, which does something at a chosen point.

    python tests/support/several.py POINT WHO STEP -- FLAGS OF TRAIN

Only the process with the index WHO does it. POINT is one of
  raise      raises an exception when step STEP is dispatched and the last checkpoint before it is complete
  terminate  sends SIGTERM to itself as soon as step STEP is dispatched
  saving     dies (kill -9) while it writes its part of checkpoint STEP
  other      trains with another seed than the other processes
  nothing    does nothing special

Every process notes in the file WORKDIR.PROCESS which rows it reads ("rows STEP [...]"), and which files of the workdir
it opens for writing ("writes NAME").
"""

import os
import signal
import sys
import time
from pathlib import Path

import dying


def main() -> None:
    """Prepares what happens at the chosen point, then trains."""
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
    from llada_jax.devices import distributed
    from llada_jax.formats import workdir
    from llada_jax.training import loop

    dispatch, batch = loop.Loop._step, pipeline.TrainingData.batch

    def tell(line: str) -> None:
        os.write(notes, f"{line}\n".encode())  # in one call, so that lines of several threads do not mix

    def told_batch(self, at, rows):
        tell(f"rows {at} {list(rows)}")
        return batch(self, at, rows)

    def step_and_act(self, *args):
        state = dispatch(self, *args)
        if self.done == int(step):
            if point == "raise":
                # A process that fails does not wait for a checkpoint that all processes write.
                while int(step) - max(workdir.steps_in(Path(folder)), default=0) >= self.config.checkpoint.every:
                    time.sleep(0.05)
                raise RuntimeError("a step that fails")
            elif point == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
        if point == "terminate" and self.done >= int(step):
            time.sleep(1)  # otherwise the run would end before the processes have agreed on a step to stop at
        return state

    def told_open(event, args):
        if event == "open" and isinstance(args[0], str) and args[0].startswith(folder + "/") and args[2] & os.O_ACCMODE:
            tell(f"writes {os.path.relpath(args[0], folder)}")

    distributed._LOOK_SECONDS = 0.2  # so that a test does not wait until a process notices the other's failure
    pipeline.TrainingData.batch = told_batch
    loop.Loop._step = step_and_act
    sys.addaudithook(told_open)
    if point == "saving":
        dying.die_when_written(Path(folder) / workdir.CHECKPOINTS, int(step))
    if point == "other":
        sys.argv.append("--config.seed=5")
    entry_point.run(train.main)


if __name__ == "__main__":
    main()
