"""python -m llada_jax.prepare: text files -> a prepared set to train on.

python -m llada_jax.prepare --input='text/*.jsonl.gz' --output=sets/text --tokenizer=tokenizer.model
python -m llada_jax.prepare --input=book.txt --output=sets/book --train_tokenizer=4096 --sequence_length=512
"""

import time

from absl import flags

from llada_jax import command_line
from llada_jax.data.prepare import prepare

_INPUT = flags.DEFINE_multi_string(
    "input",
    None,
    "File or glob: .txt and .jsonl (also .gz or .xz of them), .parquet; or the word stdlib, for the "
    "source files of Python's standard library. May be repeated.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must not exist yet.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "SentencePiece .model, tokenizer.json, or a folder with either.")
_TRAIN_TOKENIZER = flags.DEFINE_integer(
    "train_tokenizer", None, "Instead of --tokenizer: the size of a vocabulary to train on the text."
)
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 4096, "Tokens per row.")
_VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.02, "Share of the documents that is held out, chosen by the hash of their text."
)
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes that tokenise; 0 = one per core. The result is the same.")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Key of the text in .jsonl, its column in .parquet.")
flags.mark_flags_as_required(["input", "output"])


def main() -> None:
    """Prepares what the flags say and prints a summary."""
    start = time.monotonic()
    output = _OUTPUT.value
    manifest = prepare(
        _INPUT.value,
        output,
        tokenizer=_TOKENIZER.value,
        train_tokenizer=_TRAIN_TOKENIZER.value,
        sequence_length=_SEQUENCE_LENGTH.value,
        validation_fraction=_VALIDATION_FRACTION.value,
        workers=_WORKERS.value,
        text_key=_TEXT_KEY.value,
    )
    seconds = time.monotonic() - start
    train, validation = manifest.train, manifest.validation
    tokens = train.tokens + validation.tokens
    print(
        f"{output}: {train.rows:,} rows to train on and {validation.rows:,} held out, of {manifest.sequence_length:,} "
        f"tokens\n"
        f"{tokens:,} tokens, {(train.bytes + validation.bytes) / tokens:.2f} bytes per token, "
        f"vocabulary {manifest.tokenizer_size:,}, {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)\n"
        f"next: {_next_command(output, manifest.sequence_length)}"
    )


def _next_command(output: str, sequence_length: int) -> str:
    return (
        "python -m llada_jax.train --config=configs/quickstart.py --workdir=runs/first "
        f"--config.data.input= --config.data.path={output} --config.sequence_length={sequence_length}"
    )


if __name__ == "__main__":
    command_line.run(main)
