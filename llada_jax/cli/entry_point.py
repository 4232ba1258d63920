"""What the entry points share: they parse flags, report mistakes in one clear line, and exit with a code."""

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from absl import app, flags, logging

from llada_jax.cli import compilation_cache
from llada_jax.config import Config, UserError

FINISHED, FAILURE, USER_ERROR, INTERRUPTED, PREEMPTED = 0, 1, 2, 130, 143


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> None:
    """Parses absl flags, calls `main` and exits with the code that it returns.

    A wrong flag, a config file that raises an exception, or a `UserError` leads to one line on stderr and exit code 2;
    Ctrl-C leads to exit code 130. Any other exception keeps its traceback (exit code 1). --help prints the flags of the
    entry point.

    Args:
      main: The entry point. It returns the exit code; None means 0.
      argv: The command line, including the name of the program. None means sys.argv.
    """
    logging.use_absl_handler()
    # Do not log while flags are parsed: ml_collections would warn of mistakes that are reported below in one line.
    logging.set_verbosity(logging.FATAL)
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-h"} & set(argv[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=FINISHED)
    try:
        # Parsing the --config flag executes the config file, so mistakes in that file raise their exceptions here.
        rest = flags.FLAGS(argv)
        if logging.get_verbosity() == logging.FATAL:  # --verbosity was not given
            logging.set_verbosity(logging.WARNING)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: pass every setting as a flag, --name=value")
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
    """Returns the config that a parsed --config flag holds.

    Args:
      holder: The flag.

    Raises:
      UserError: If the flag or its file is missing, or if get_config() does not return a Config.
    """
    config = holder.value
    if isinstance(config, Config):
        return config
    flag = flags.FLAGS[holder.name]
    if not flag.present:
        raise UserError("--config=FILE is missing: pass a config file, e.g. --config=configs/quickstart.py")
    try:
        # If ml_collections could not read the file, the value is a stand-in that raises the reason when it is used.
        _ = config.steps
    except OSError as error:
        raise UserError(f"--config={flag.config_filename}: {error.__cause__}") from None
    except AttributeError:
        pass
    raise UserError("get_config() in the --config file must return a llada_jax.config.Config")


def print_error(message: str) -> None:
    """Prints the message about a user's mistake to stderr, in one line."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    print_error(message)
    sys.exit(USER_ERROR)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yields the frames that the exception passed through, the outermost frame first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is_parsing(frame: FrameType) -> bool:
    """Returns whether the frame is absl's parsing of flags. An exception that passed it did not come from `main`."""
    return frame.f_code.co_name == "__call__" and "absl" in frame.f_code.co_filename


def _explain(error: BaseException) -> str:
    """Returns what went wrong in a config file, with the file and the line."""
    # absl and ml_collections wrap some errors in others whose text contains a traceback.
    while cause := error.__cause__ or error.__context__:
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
