"""Judges documents by the filters that a preparation was asked for: which of them are left out, and why.

The filters apply in this order; the first one that objects is the reason that is counted:

  languages       the language of the beginning of the text (py3langid) is not among those asked for
  quality         a rule of Gopher or C4 is broken, see quality.py. C4 also removes single lines of texts that stay
  decontaminate   the text has a run of words in common with an evaluation set, see overlap.py
  dedupe          the text as it is after the stages above occurs earlier among the texts that they keep, exactly or
                  nearly, see duplicates.py

A document is what is held out as a whole: each piece of a long .txt file is judged on its own (see text.py).
"""

import functools
import glob
import hashlib
import importlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.manifest import Filtered, FilteredSource
from llada_jax.data.prepare import quality
from llada_jax.data.prepare.duplicates import BANDS, EXACT_KEYS, exact_keys, near_keys
from llada_jax.data.prepare.overlap import overlaps, runs_of

DEDUPE = ("none", "exact", "near")
LANGUAGE, OVERLAP, EXACT, NEAR = "another language", "evaluation set", "exact duplicate", "near duplicate"
# A reason is stored as its index in this tuple.
REASONS = ("", LANGUAGE, *quality.REASONS, OVERLAP, EXACT, NEAR)

_LANGUAGE_CHARACTERS = 4096  # the language is told from this many characters at the beginning
_CODES = {reason: code for code, reason in enumerate(REASONS)}


class Filters(NamedTuple):
    """The filters that are asked for. The default filters nothing."""

    dedupe: str = "none"  # a name in DEDUPE; "near" finds exact duplicates, too
    quality: tuple[str, ...] = ()  # names in quality.NAMES
    languages: tuple[str, ...] = ()  # codes of two letters (ISO 639), as py3langid names languages; () = all
    decontaminate: tuple[str, ...] = ()  # files of evaluation sets

    @property
    def active(self) -> bool:
        """Whether anything is filtered."""
        return self != Filters()

    @property
    def keys(self) -> int:
        """The number of uint64 keys that finding duplicates needs of each document."""
        return {"none": 0, "exact": EXACT_KEYS, "near": EXACT_KEYS + BANDS}[self.dedupe]

    def checked(self) -> "Filters":
        """Returns itself if it can be used here.

        Raises:
          UserError: If a name is unknown, a package is missing, or a file of an evaluation set cannot be read.
        """
        for flag, names, known in (
            ("dedupe", (self.dedupe,), DEDUPE),
            ("quality", self.quality, quality.NAMES),
        ):
            for name in names:
                if name not in known:
                    raise UserError(f"{flag}={name}: choose from {', '.join(known)}")
        if self.dedupe == "near":
            _require("datasketch", "dedupe=near")
        if self.languages:
            _require("py3langid", "languages")
            for name in self.languages:
                if name not in _language_model().labels:
                    known = ", ".join(sorted(_language_model().labels))
                    raise UserError(f"languages={name}: py3langid knows {known}")
        if self.decontaminate:
            _runs(self.decontaminate)
        return self

    def edit(self, text: str) -> str:
        """Returns the text that a document which stays is prepared with."""
        return quality.c4(text)[1] if "c4" in self.quality else text

    def judge(self, text: str) -> tuple[int, str, int]:
        """Returns (index in REASONS, 0 = the text stays; the text as `edit` returns it; lines that this removed)."""
        lines = 0
        if self.languages and _language_model().classify(text[:_LANGUAGE_CHARACTERS])[0] not in self.languages:
            return _CODES[LANGUAGE], text, 0
        for name, rule in quality.RULES.items():
            if name in self.quality and (reason := rule(text)):
                return _CODES[reason], text, 0
        if "c4" in self.quality:
            reason, text, lines = quality.c4(text)
            if reason:
                return _CODES[reason], text, 0
        if self.decontaminate and overlaps(text, _runs(self.decontaminate)):
            return _CODES[OVERLAP], text, 0
        return 0, text, lines

    def duplicate_keys(self, text: str) -> np.ndarray:
        """Returns the keys of an edited text by which duplicates are found, uint64 [`keys`]: exact, then near."""
        parts = [exact_keys(text)] if self.keys else []
        parts += [near_keys(text)] if self.dedupe == "near" else []
        return np.concatenate(parts) if parts else np.zeros(0, np.uint64)

    def described(self, sources: Sequence[FilteredSource], examples: dict[str, tuple[str, ...]]) -> Filtered:
        """Returns what the manifest says of the filters and of what they left out."""
        files = tuple(f"{os.path.basename(file)} sha256:{_sha256(file)}" for file in self.decontaminate)
        return Filtered(self.dedupe, self.quality, self.languages, files, tuple(sources), examples)


def code_of(reason: str) -> int:
    """Returns the index of a reason in REASONS."""
    return _CODES[reason]


def found_files(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the files of evaluation sets that names and globs stand for, in a fixed order.

    Raises:
      UserError: If there is no file of a name.
    """
    files: list[str] = []
    for name in names:
        found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not found:
            raise UserError(f"decontaminate={name}: there is no such file")
        files += found
    return tuple(dict.fromkeys(files))


def _require(package: str, flag: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{flag} needs the package {package}: pip install 'llada_jax[filters]'") from error


@functools.cache
def _language_model():
    """Returns the language identifier of py3langid, with its own model, which is part of the package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


@functools.cache
def _runs(files: tuple[str, ...]) -> dict[int, frozenset[str]]:
    return runs_of(files)


def _sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
