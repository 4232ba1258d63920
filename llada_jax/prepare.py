"""Prepares text files or conversations as a set to train on.

python -m llada_jax.prepare --input='text/*.jsonl.gz' --output=sets/text --tokenizer=tokenizer.model
python -m llada_jax.prepare --input=book.txt --output=sets/book --train_tokenizer=4096 --sequence_length=512
python -m llada_jax.prepare --chat --input='chats/*.jsonl.gz' --output=sets/chats --tokenizer=LLaDA-8B-Base
"""

import time

from absl import flags

from llada_jax.cli import entry_point, paths
from llada_jax.config import UserError
from llada_jax.data.prepare.answers import RULES
from llada_jax.data.prepare.filters import DEDUPE, Filters, found_files
from llada_jax.data.prepare.fleet import prepare_on_fleet
from llada_jax.data.prepare.left_out import LARGEST_SHARE, ON_ERROR
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.prepare.runners import RUNNERS
from llada_jax.data.prepare.summary import chat_summary, text_summary

_INPUT = paths.define_multi(
    "input",
    None,
    "File or glob to read: .txt or .jsonl (both also compressed as .gz or .xz), or .parquet. The word stdlib stands "
    "for the source files of Python's standard library. A URL such as gs://BUCKET/*.jsonl.gz is read where it lies. "
    "The flag may be repeated.",
)
_OUTPUT = paths.define(
    "output", None, "Folder to write; with --runner also gs://BUCKET/SET. It must not exist yet, or must be empty."
)
_CHAT = flags.DEFINE_boolean(
    "chat",
    False,
    "Read the input as conversations for instruction tuning: .jsonl files (also .gz, .xz) whose lines have the key "
    "messages or conversations; or prompt and response; or instruction, output and optionally input; or question, "
    "answer and optionally context; each with system, history or tools if needed.",
)
_TOO_LONG = flags.DEFINE_enum(
    "too_long",
    "drop",
    RULES,
    "With --chat: what to do with an answer that, together with its prompt, is longer than --sequence_length. drop "
    "leaves it out; cut removes the oldest turns of the prompt and, if that is not enough, the end of the answer.",
)
_GROUP_KEY = flags.DEFINE_string(
    "group_key",
    None,
    "With --chat: name of a key in the lines, for example document. Conversations with the same value under this key "
    "are held out together.",
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error",
    "stop",
    ON_ERROR,
    "What to do with a document or conversation that is bad, for example a line that is not JSON. stop ends the "
    "preparation; skip leaves it out, lists how many there were of each kind, and fails if more than "
    f"{LARGEST_SHARE:.0%} of all are bad.",
)
_TOKENIZER = paths.define(
    "tokenizer",
    None,
    "Tokenizer to use: a SentencePiece .model, a tokenizer.json, or a folder with either, such as a model's folder or "
    "a training workdir.",
)
_TRAIN_TOKENIZER = flags.DEFINE_integer(
    "train_tokenizer", None, "Vocabulary size of a tokenizer to train on the text, instead of --tokenizer."
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 4096, "Number of tokens per row; with --chat, the maximum number."
)
_VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction",
    0.02,
    "Share of the documents (or conversations) to hold out. The hash of their text decides which ones.",
)
_WORKERS = flags.DEFINE_integer(
    "workers", 0, "Number of processes that tokenise; 0 means one per core. The result does not depend on this number."
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key", "text", "Key of the text in a .jsonl file, and name of its column in a .parquet file; a.b is b in a."
)
_DEDUPE = flags.DEFINE_enum(
    "dedupe",
    "none",
    DEDUPE,
    "Leave out documents that occur earlier in the input: exact compares the whole text; near also finds documents "
    "that are mostly the same, by MinHash (needs the extra filters).",
)
_QUALITY = flags.DEFINE_list(
    "quality",
    [],
    "Rules of quality that documents must keep, from gopher, gopher_repetition and c4, separated by commas. They are "
    "made for English pages of the web. c4 also removes single lines.",
)
_LANGUAGES = flags.DEFINE_list(
    "languages",
    [],
    "Languages to keep, for example en,de; documents in others are left out. Without this flag, all are kept. Needs "
    "the extra filters.",
)
_DECONTAMINATE = paths.define_multi(
    "decontaminate",
    [],
    "File or glob of an evaluation set (.txt, .jsonl or .json): documents that have 13 words in a row in common with "
    "it are left out. The flag may be repeated.",
)
_RUNNER = flags.DEFINE_enum(
    "runner",
    None,
    RUNNERS,
    "Prepare text by Apache Beam (extra beam) on this machine (direct) or on a fleet: the same set, byte for byte. A "
    "file is one unit of work. What is unfinished lies in OUTPUT.unfinished; the same command goes on with it.",
)
_RUNNER_OPTIONS = flags.DEFINE_string(
    "runner_options", "", "With --runner: options of Beam, as on a command line, for example '--project=P --region=R'."
)
flags.mark_flags_as_required(["input", "output"])


def main() -> None:
    """Prepares a set as the flags say, and prints a summary."""
    start = time.monotonic()
    output = _OUTPUT.value
    same = {
        "sequence_length": _SEQUENCE_LENGTH.value,
        "validation_fraction": _VALIDATION_FRACTION.value,
        "workers": _WORKERS.value,
        "on_error": _ON_ERROR.value,
    }
    if _CHAT.value:
        text_only = {"train_tokenizer": _TRAIN_TOKENIZER, "text_key": _TEXT_KEY, "dedupe": _DEDUPE}
        text_only |= {"runner": _RUNNER, "runner_options": _RUNNER_OPTIONS}
        text_only |= {"quality": _QUALITY, "languages": _LANGUAGES, "decontaminate": _DECONTAMINATE}
        _refuse("--chat", text_only)
        if _TOKENIZER.value is None:
            raise UserError("--tokenizer is missing: pass the tokenizer of the model that you want to tune")
        chat = {"too_long": _TOO_LONG.value, "group_key": _GROUP_KEY.value}
        manifest = prepare_chat(_INPUT.value, output, tokenizer=_TOKENIZER.value, **chat, **same)
        print(chat_summary(output, manifest, _TOKENIZER.value, time.monotonic() - start))
        return
    _refuse("text", {"too_long": _TOO_LONG, "group_key": _GROUP_KEY})
    same |= {"text_key": _TEXT_KEY.value, "filters": _filters()}
    if _RUNNER.value is not None:
        if _TOKENIZER.value is None or _TRAIN_TOKENIZER.value is not None:
            raise UserError("--runner needs --tokenizer: train one on a part of the text first, without --runner")
        if _RUNNER.value != "direct":
            _refuse(f"--runner={_RUNNER.value}, whose own options set it (--runner_options)", {"workers": _WORKERS})
        runner = {"runner": _RUNNER.value, "runner_options": _RUNNER_OPTIONS.value}
        manifest = prepare_on_fleet(_INPUT.value, output, tokenizer=_TOKENIZER.value, **runner, **same)
    else:
        _refuse("text without --runner", {"runner_options": _RUNNER_OPTIONS})
        trained = {"train_tokenizer": _TRAIN_TOKENIZER.value}
        manifest = prepare(_INPUT.value, output, tokenizer=_TOKENIZER.value, **trained, **same)
    print(text_summary(output, manifest, time.monotonic() - start))


def _filters() -> Filters:
    """Returns the filters that the flags ask for."""
    quality, languages = (tuple(map(str.strip, holder.value)) for holder in (_QUALITY, _LANGUAGES))
    return Filters(_DEDUPE.value, quality, languages, found_files(_DECONTAMINATE.value))


def _refuse(kind: str, others: dict[str, flags.FlagHolder]) -> None:
    """Raises UserError if the user passed a flag that has no meaning for this kind of input."""
    for name, holder in others.items():
        if holder.present:
            raise UserError(f"--{name} has no meaning for {kind}: leave it out")


if __name__ == "__main__":
    entry_point.run(main)
