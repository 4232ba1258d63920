"""Writes the files that keep how texts appeared: `--save_html` and `--save_gif`."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llada_jax.cli import outputs
from llada_jax.config import UserError
from llada_jax.sampling import animation, replay
from llada_jax.sampling.recording import Record

_MOST = {"save_html": replay.MOST, "save_gif": animation.MOST}


def check(wanted: Mapping[str, str | None], output: Path | None, prompts: int) -> dict[str, Path]:
    """Checks that the files can be made, before anything is sampled.

    Args:
      wanted: The name of the file, or None, by flag: save_html and save_gif.
      output: Another file that the command writes.
      prompts: The number of prompts.

    Returns:
      The paths of the files to write, by flag.

    Raises:
      UserError: If a file cannot be written or is named twice, if Pillow is missing, or if there are too many prompts.
    """
    found = {flag: outputs.check_file(name, flag) for flag, name in wanted.items() if name is not None}
    taken = {os.path.realpath(output): "output"} if output is not None else {}
    for flag, path in found.items():
        if prompts > _MOST[flag]:
            raise UserError(f"--{flag}={path} holds at most {_MOST[flag]} prompts, but there are {prompts}")
        if (other := taken.setdefault(os.path.realpath(path), flag)) != flag:
            raise UserError(f"--{flag}={path} and --{other} name the same file")
    if "save_gif" in found:
        animation.require_pillow()
    return found


def write(paths: Mapping[str, Path], records: Sequence[Record], settings: Mapping[str, Any]) -> None:
    """Writes the files, and says so on stderr.

    Args:
      paths: What `check` has returned.
      records: The records of all prompts.
      settings: What the page names beside the settings of the sampler.

    Raises:
      UserError: If a file cannot be written.
    """
    for flag, path in paths.items():
        if flag == "save_html":
            content = replay.page(records, dict(settings)).encode()
        else:
            content, missing = animation.gif(records)
            if missing:
                print(f"--save_gif: boxes stand for {missing} characters that no font here has", file=sys.stderr)
        outputs.write_bytes(path, content, flag)
        print(f"wrote {path} ({len(content) / 1000:,.0f} kB)", file=sys.stderr)
