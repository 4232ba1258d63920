"""What the entry points share: flags in, one clear line and an exit code out."""

import sys
from collections.abc import Callable, Sequence

from absl import flags, logging

from llada_jax.config import UserError

FINISHED, FAILURE, USER_ERROR, PREEMPTED = 0, 1, 2, 143


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> None:
    """Parses absl flags, calls `main` and exits with its code (None = 0).

    A wrong flag or a `UserError` ends in one line on stderr and exit code 2, Ctrl-C in 130;
    any other exception keeps its traceback (exit code 1).
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    argv = list(sys.argv if argv is None else argv)
    try:
        # A config file is executed while its flag is parsed: its own mistakes surface here too.
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: every setting is a flag, --name=value")
        sys.exit(main())
    except UserError as error:
        _fail(str(error))
    except flags.Error as error:
        _fail(str(error))
    except (KeyError, AttributeError, TypeError, ValueError, OSError, SyntaxError) as error:
        if not _raised_while_parsing(error):
            raise
        _fail(f"--config: {_text(error)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(USER_ERROR)


def _text(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error)


def _raised_while_parsing(error: Exception) -> bool:
    """True if the exception came out of flag parsing, not out of `main`."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name == "__call__" and "absl" in frame.tb_frame.f_code.co_filename:
            return True
        frame = frame.tb_next
    return False
