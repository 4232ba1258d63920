"""Paths that a user names: a leading ~ stands for a home folder, in flags and in settings.

A shell replaces ~ at the start of a word, but not in --output=~/sets. Variables such as $HOME are left to the shell.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from llada_jax.config import Config, UserError

# The settings that hold a path, by their dotted names, and those that hold several paths, separated by commas.
SETTINGS = ("data.cache", "data.tokenizer", "init_from")
LISTS = ("data.path", "data.input")


def expanded(path: str | os.PathLike) -> str:
    """Returns a path with a leading ~ or ~USER replaced by the home folder. Any other path stays as it is.

    Raises:
      UserError: If there is no home folder of this name. Without this, a folder called ~USER would be made.
    """
    path = os.fspath(path)
    try:
        found = os.path.expanduser(path) if path.startswith("~") else path
    except ValueError:  # a name that no user can have, for example with a NUL in it
        found = path
    if found.startswith("~"):
        name = path.split("/")[0]
        raise UserError(f"{path}: there is no home folder {name}; write ./{path} if the name really begins with ~")
    return found


def expanded_path(text: str) -> Path:
    """Returns a path that a user has typed, with ~ replaced: a type for flags of argparse."""
    return Path(expanded(text))


def expand_settings(config: Config) -> None:
    """Replaces a leading ~ in all settings that hold paths, in place. Raises UserError as `expanded`."""
    for name in (*SETTINGS, *LISTS):
        *sections, field = name.split(".")
        node = config
        for section in sections:
            node = getattr(node, section)
        value = getattr(node, field)
        if not isinstance(value, str) or "~" not in value:
            continue
        try:
            if name in LISTS:
                setattr(node, field, ",".join(expanded(item.strip()) for item in value.split(",")))
            else:
                setattr(node, field, expanded(value))
        except UserError as error:
            raise UserError(f"config.{name}={error}") from None


def expand_config_flag(arguments: Iterable[str]) -> list[str]:
    """Returns a command line in which the value of --config has no leading ~. Raises UserError as `expanded`."""
    result: list[str] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if "--" in result:
            result.append(word)
        elif equals and name in ("--config", "-config"):
            result.append(f"{name}={expanded(value)}")
        else:
            result.append(expanded(word) if result and result[-1] in ("--config", "-config") else word)
    return result


class _Parser(flags.ArgumentParser):
    """Parses the value of a flag that is a path."""

    def parse(self, argument: str) -> str:
        try:
            return expanded(argument)
        except UserError as error:
            raise ValueError(str(error)) from None


def define(name: str, default: str | None, help_: str, **options) -> flags.FlagHolder:
    """Defines a flag whose value is a path."""
    return flags.DEFINE(_Parser(), name, default, help_, serializer=flags.ArgumentSerializer(), **options)


def define_multi(name: str, default: list[str] | None, help_: str, **options) -> flags.FlagHolder:
    """Defines a flag whose values are paths. It may be repeated."""
    return flags.DEFINE_multi(_Parser(), flags.ArgumentSerializer(), name, default, help_, **options)


# The flags that `define` makes belong to the module that calls it, so that --help shows them.
flags.disclaim_key_flags()
