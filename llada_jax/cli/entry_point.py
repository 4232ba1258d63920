"""What the entry points share: they parse flags, report mistakes in one clear line, and exit with a code."""

import contextlib
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from absl import app, flags, logging

from llada_jax.cli import compilation_cache, config_help, machine_errors, paths, spelling, streams
from llada_jax.config import Config, NonFinite, UserError

FINISHED, FAILURE, USER_ERROR, INTERRUPTED, PREEMPTED = 0, 1, 2, 130, 143
_HELP = ("h", "?", "help", "helpshort", "helpfull")


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> None:
    """Parses absl flags, calls `main` and exits with the code that it returns.

    A wrong flag, a config file that raises an exception, or a `UserError` leads to one line on stderr and exit code 2;
    Ctrl-C leads to exit code 130. `NonFinite`, a file that the machine cannot read or write, and a stdout that cannot
    be written lead to one line and exit code 1; if the reader of stdout has gone, as in `| head`, nothing is said. Any
    other exception keeps its traceback (exit code 1).

    --help (-h) prints the docstring and the flags of the entry point and, if it has a --config flag, all settings. With
    --config=FILE it also shows the values of that file. --helpshort leaves out the settings, and --helpfull adds the
    flags of all imported modules.

    Args:
      main: The entry point. It returns the exit code; None means 0.
      argv: The command line, including the name of the program. None means sys.argv.
    """
    logging.use_absl_handler()
    # Do not log while flags are parsed: ml_collections would warn of mistakes that are reported below in one line.
    logging.set_verbosity(logging.FATAL)
    streams.prepare()
    try:
        argv = paths.expand_config_flag(sys.argv if argv is None else argv)
        asked = [word for word in _before_dashes(argv[1:]) if word.startswith("-") and word.lstrip("-") in _HELP]
        if asked:
            _print_help(argv[1:], asked[0].lstrip("-"))
            sys.exit(FINISHED)
        # Parsing the --config flag executes the config file, so mistakes in that file raise their exceptions here.
        rest = flags.FLAGS(argv)
        if logging.get_verbosity() == logging.FATAL:  # --verbosity was not given
            logging.set_verbosity(logging.WARNING)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: pass every setting as a flag, --name=value")
        compilation_cache.enable()
        code = main()
        if lost := streams.failed_stdout():
            _leave_without_stdout(lost)
        sys.exit(code)
    except UserError as error:
        _fail(str(error))
    except NonFinite as error:
        print_error(str(error))
        sys.exit(FAILURE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and (lost := streams.failed_stdout()):
            _leave_without_stdout(lost)
        if isinstance(error, flags.UnrecognizedFlagError):
            _fail(_about_unknown_flag(error))
        if isinstance(error, flags.IllegalFlagValueError) and (message := spelling.section_with_a_value(argv[1:])):
            _fail(message)
        if isinstance(error, flags.Error) and "Traceback" not in str(error):
            _fail(str(error))
        if not any(_is_parsing(frame) for frame in _frames(error)):
            if isinstance(error, OSError) and error.errno in machine_errors.MACHINE and error.filename is not None:
                print_error(f"{error.filename}: {machine_errors.reason(error)}")
                sys.exit(FAILURE)
            raise
        if not isinstance(error, OSError) and any(map(_is_override, _frames(error))):
            message = spelling.misspelt(argv[1:], plain_flags=flags.FLAGS)
            if message:
                _fail(message)
        _fail(f"--config: {_explain(error)}")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Wraps the imports of `main` that take seconds, so that the help and mistakes in the flags need not wait for them.

    The garbage collector pauses, which would take a seventh of that time and find next to nothing. At the end the
    compilation cache is turned on, if jax has been imported.
    """
    was_collecting, had_jax = gc.isenabled(), "jax" in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()
    if not had_jax:
        gc.freeze()  # modules live as long as the process
    compilation_cache.enable()


def config_of(holder: flags.FlagHolder) -> Config:
    """Returns the config that a parsed --config flag holds. A leading ~ in a setting that is a path is replaced.

    Args:
      holder: The flag.

    Raises:
      UserError: If the flag or its file is missing, or if get_config() does not return a Config.
    """
    flag = flags.FLAGS[holder.name]
    if not isinstance(holder.value, Config) and not flag.present:
        raise UserError("--config=FILE is missing: pass a config file, e.g. --config=configs/quickstart.py")
    config = _checked(holder.value, flag.config_filename)
    paths.expand_settings(config)
    return config


def _checked(config: Any, file: str) -> Config:
    """Returns the value of a --config flag. Raises UserError if the file is missing or does not return a Config."""
    if isinstance(config, Config):
        return config
    try:
        # If ml_collections could not read the file, the value is a stand-in that raises the reason when it is used.
        _ = config.steps
    except OSError as error:
        raise UserError(f"--config={file}: {error.__cause__}") from None
    except AttributeError:
        pass
    raise UserError("get_config() in the --config file must return a llada_jax.config.Config")


def _print_help(arguments: Sequence[str], kind: str) -> None:
    """Prints what --help, --helpshort or --helpfull show."""
    text = ""
    if kind != "helpshort" and _has_config():
        # A width of less than 60 would leave comments too little room, and long lines are hard to read.
        width = min(max(shutil.get_terminal_size().columns, 60 if sys.stdout and sys.stdout.isatty() else 80), 120)
        text = "\n" + config_help.render(width, *_given_config(arguments))
    streams.require_stdout("start the program with stdout open")
    try:
        app.usage(shorthelp=kind != "helpfull", writeto_stdout=True)
        print(text, end="", flush=True)
    except BrokenPipeError:
        # The reader has gone, as in `--help | head`. Without this, Python would complain when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _has_config() -> bool:
    """Returns whether the entry point has a --config flag that holds a config tree."""
    return "config" in flags.FLAGS and flags.FLAGS["config"].flag_type() == "config object"


def _given_config(arguments: Sequence[str]) -> tuple[Config | None, str]:
    """Returns the config of the file that --config=FILE names in the command line, and FILE; (None, "") without it."""
    file = ""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            file = value if equals else following
    if not file:
        return None, ""
    try:
        return _checked(flags.FLAGS["config"].parser.parse(file), file), file
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config: {_explain(error)}") from error


def _before_dashes(arguments: Sequence[str]) -> Sequence[str]:
    """Returns the arguments in front of "--", behind which there are no flags."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _about_unknown_flag(error: flags.UnrecognizedFlagError) -> str:
    if not _has_config() or "Did you mean" in str(error):
        return str(error)
    if error.flagname.startswith("config."):
        return f"--config=FILE is missing: pass a config file in front of --{error.flagname}"
    meant = spelling.unknown_flag(error.flagname, flags.FLAGS)
    return f"{error}; {meant}" if meant else str(error)


def print_error(message: str) -> None:
    """Prints the message about a user's mistake to stderr, in one line."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    print_error(message)
    sys.exit(USER_ERROR)


def _leave_without_stdout(lost: OSError) -> None:
    if not isinstance(lost, BrokenPipeError):
        print_error(f"stdout cannot be written: {lost.strerror}")
    sys.exit(FAILURE)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yields the frames that the exception passed through, the outermost frame first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is_parsing(frame: FrameType) -> bool:
    """Returns whether the frame is absl's parsing of flags. An exception that passed it did not come from `main`."""
    return frame.f_code.co_name == "__call__" and "absl" in frame.f_code.co_filename


def _is_override(frame: FrameType) -> bool:
    """Returns whether the frame looks up the setting of a flag --config.NAME."""
    return frame.f_globals.get("__name__") == "ml_collections.config_flags.config_path"


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
    if not place:
        return text
    meant = spelling.mistaken_attribute(text) if isinstance(error, AttributeError | TypeError) else None
    return f"{type(error).__name__}: {text}{f'; {meant}' if meant else ''}{place}"
