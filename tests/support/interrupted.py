"""An evaluation that kills itself: python tests/support/interrupted.py COUNT FLAGS OF EVALUATE

It dies (kill -9) as soon as the results of COUNT requests are in the cache.
"""

import os
import signal
import sys
import time


def main() -> None:
    """Prepares the process to die, then evaluates."""
    left = int(sys.argv.pop(1))
    from lm_eval.api.model import CacheHook

    from llada_jax import evaluate
    from llada_jax.cli import entry_point

    add = CacheHook.add_partial

    def add_and_die(self, attr, req, res):
        nonlocal left
        add(self, attr, req, res)
        left -= 1
        if not left:
            self.dbdict.sync()
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

    CacheHook.add_partial = add_and_die
    entry_point.run(evaluate.main)


if __name__ == "__main__":
    main()
