"""What the entry points share: flags in, one clear line and an exit code out."""

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from absl import app, flags, logging

from llada_jax.cli import compilation_cache
from llada_jax.config import Config, UserError

FINISHED, FAILURE, USER_ERROR, INTERRUPTED, PREEMPTED = 0, 1, 2, 130, 143


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> None:
    """Parses absl flags, calls `main` and exits with its code (None = 0).

    A wrong flag, a config file that fails or a `UserError` ends in one line on stderr and exit code 2, Ctrl-C
    in 130; any other exception keeps its traceback (exit code 1). --help prints the entry point's own flags.
    """
    logging.use_absl_handler()
    # Silent while flags are parsed: ml_collections would warn of a mistake that is reported here in one line.
    logging.set_verbosity(logging.FATAL)
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-h"} & set(argv[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=FINISHED)
    try:
        # A config file is executed while its flag is parsed: its own mistakes surface here too.
        rest = flags.FLAGS(argv)
        if logging.get_verbosity() == logging.FATAL:  # --verbosity was not given
            logging.set_verbosity(logging.WARNING)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: every setting is a flag, --name=value")
        compilation_cache.enable()
        sys.exit(main())
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, flags.Error) and "Traceback" not in str(error):
            _fail(str(error))
        if not any(_is_parsing(frame) for frame in _frames(error)):
            raise
        _fail(f"--config: {_explain(error)}")


def config_of(holder: flags.FlagHolder) -> Config:
    """The value of a parsed --config flag.

    Raises:
      UserError: the flag or its file is missing, or get_config() returns something else.
    """
    config = holder.value
    if isinstance(config, Config):
        return config
    flag = flags.FLAGS[holder.name]
    if not flag.present:
        raise UserError("--config=FILE is missing, e.g. --config=configs/quickstart.py")
    try:
        # For a file it could not read ml_collections hands out a stand-in, any use of which raises why.
        _ = config.steps
    except OSError as error:
        raise UserError(f"--config={flag.config_filename}: {error.__cause__}") from None
    except AttributeError:
        pass
    raise UserError("get_config() in the file of --config must return a llada_jax.config.Config")


def print_error(message: str) -> None:
    """Tells of a user's mistake in one line."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    print_error(message)
    sys.exit(USER_ERROR)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Where the exception passed through, the outermost frame first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is_parsing(frame: FrameType) -> bool:
    """True within absl's parsing of flags: the exception then did not come out of `main`."""
    return frame.f_code.co_name == "__call__" and "absl" in frame.f_code.co_filename


def _explain(error: BaseException) -> str:
    """What went wrong in a config file and in which line of it."""
    while cause := error.__cause__ or error.__context__:  # absl and ml_collections wrap some, tracebacks in their text
        error = cause
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    machinery = ("absl", "ml_collections", "importlib", "llada_jax", "__main__")
    place = ""
    traceback = error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in machinery:
            place = f" ({traceback.tb_frame.f_code.co_filename}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return f"{type(error).__name__}: {text}{place}" if place else text
