"""Prepares conversations: writes ArrayRecord shards of prompts with answers, an index of their lengths and a manifest.

Every answer of a conversation becomes a row (see data/pairs.py). The row holds the prompt and the answer as the chat
template in the tokenizer's folder renders them (LLaDA's own template if the folder has none), and EOS. The setting
`too_long` says what is done with a row that is longer than `sequence_length`:

  drop   The row is left out.
  cut    The row is made to fit. The oldest turns of its prompt are removed, each time up to the next message of the
         user; a system message at the beginning stays. If the last turn alone is too long, the answer loses its end,
         and with it its EOS. If even the prompt leaves no room for an answer, the row is left out.

An answer without text, or with no text in any message before it, is left out. So is one that the data marks as not to
be learned; it is still context for later answers. The manifest says how many answers were dropped, cut, empty and
marked.

Keys that have no effect are listed once, on stderr. A bad line, or a conversation that the chat template refuses, ends
the preparation, unless `on_error` is "skip"; see data/prepare/left_out.py.

Whole conversations are held out. The hash of the messages before the first answer decides, so that conversations that
begin alike are in the same split. If there is a group key, the hash of the value under this key decides instead. See
data/prepare/held_out.py.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from llada_jax.cli.outputs import temporary_folder, write_errors
from llada_jax.config import UserError
from llada_jax.data.manifest import SPLITS, TOKENIZER_FOLDER, Chat, Manifest, Source, tokenizer_fields
from llada_jax.data.pairs import HEADER_BYTES, PairWriter
from llada_jax.data.prepare.answers import RULES, ChatBatch, Encoded
from llada_jax.data.prepare.conversations import Conversation, Conversations
from llada_jax.data.prepare.held_out import HASH_RULE, held_out_below, text_hash
from llada_jax.data.prepare.left_out import printable
from llada_jax.data.prepare.output import (
    SHARD_BYTES,
    Progress,
    check_settings,
    cores,
    id_dtype,
    publish,
)
from llada_jax.data.prepare.pool import Pool
from llada_jax.text.agreement import notes_of, template_hash
from llada_jax.text.tokenizer import load_tokenizer

_LISTED = 50  # number of keys without effect that are listed
_BATCH = 128  # number of conversations that a worker tokenises at a time


def prepare_chat(
    inputs: Sequence[str],
    output: str | os.PathLike,
    *,
    tokenizer: str,
    sequence_length: int = 4096,
    validation_fraction: float = 0.02,
    too_long: str = "drop",
    group_key: str | None = None,
    on_error: str = "stop",
    workers: int = 0,
    shard_rows: int = 0,
    progress: bool = True,
) -> Manifest:
    """Prepares a set for instruction tuning in the folder `output`, which appears only when it is complete.

    The content of the folder depends on the conversations, the names of the inputs and the settings. It does not depend
    on the number of workers.

    Args:
      inputs: .jsonl files (also .gz, .xz) or globs; data/prepare/shapes.py lists the shapes of their lines.
      output: A local folder that does not exist yet or is empty.
      tokenizer: The tokenizer of the model to tune: the model's folder or workdir, or the file of a tokenizer. It is
        copied into the set.
      sequence_length: The maximum number of tokens of a prompt with its answer and EOS.
      validation_fraction: The share of the conversations that is held out; 0 means none.
      too_long: "drop" or "cut", as the docstring of this module explains.
      group_key: The key that groups conversations: those with the same value under it are in the same split. None means
        that conversations with the same messages before the first answer are in the same split.
      on_error: What is done with a bad conversation: "stop" raises UserError, "skip" leaves it out and counts it in the
        manifest.
      workers: The number of processes that tokenise; 0 means one per core.
      shard_rows: The maximum number of rows per shard; 0 means as many as fit into about 256 MiB of ids.
      progress: Whether to report the progress, and the keys that have no effect, on stderr.

    Returns:
      The manifest of the set.

    Raises:
      UserError: If anything is wrong with the input, the tokenizer, the settings or the output folder, or if more than
        a tenth of the conversations are bad although `on_error` is "skip".
    """
    target = check_settings(output, sequence_length, validation_fraction, workers, shard_rows)
    if too_long not in RULES:
        raise UserError(f"too_long={too_long!r}: choose one of {', '.join(RULES)}")
    conversations = Conversations(inputs, group_key, on_error)
    loaded = load_tokenizer(tokenizer)
    for line in notes_of(loaded, tokenizer) if progress else ():
        print(line, file=sys.stderr)
    below = held_out_below(_groups(conversations), validation_fraction, conversations.inputs)
    with write_errors(output), temporary_folder(target) as folder:
        loaded.save(folder / TOKENIZER_FOLDER)
        dtype = id_dtype(loaded)
        shard_rows = shard_rows or max(1, SHARD_BYTES // (HEADER_BYTES + sequence_length * np.dtype(dtype).itemsize))
        writers = [PairWriter(folder, name, dtype, shard_rows) for name in SPLITS]
        totals = np.zeros((len(conversations.inputs), 3), np.int64)  # conversations, tokens, bytes
        counts = np.zeros(4, np.int64)  # answers that were dropped, cut, empty and context only
        bad, unread = 0, Counter()
        report = Progress(conversations.total_bytes, progress)
        with Pool(folder / TOKENIZER_FOLDER, workers or cores()) as pool, report:
            for batch, encoded in pool.map(_batches(conversations, sequence_length, too_long)):
                for conversation, error in zip(batch.conversations, encoded.bad, strict=True):
                    if error is not None:
                        conversations.faults.add(error, conversation.number)
                        bad += 1
                _write(encoded, batch.conversations, below, writers, totals)
                counts += encoded.dropped, encoded.cut, encoded.empty, encoded.context_only
                unread += encoded.unread
                position = batch.tag
                report.update(position, sum(pair.length for pairs in encoded.pairs for pair in pairs))
        left_out = conversations.faults.checked(conversations.good - bad, "conversations")
        dropped, cut, empty, context_only = map(int, counts)
        (train, train_index), (validation, validation_index) = (writer.finish() for writer in writers)
        if not train.rows:
            raise UserError(
                f"no answer is left to train on: {dropped} are too long for sequence_length={sequence_length}, "
                f"{empty} are empty, {context_only} are marked as not to be learned and {validation.rows} are held "
                "out: give more conversations or other settings"
            )
        manifest = Manifest(
            **tokenizer_fields(loaded),
            sequence_length=sequence_length,
            dtype=dtype,
            validation_fraction=validation_fraction,
            validation_hash=f"{HASH_RULE}; of {group_key or 'the messages before the first answer, as JSON'}",
            validation_below=below,
            train=train,
            validation=validation,
            sources=tuple(
                Source(name, conversations.file_count(i), *map(int, totals[i]))
                for i, name in enumerate(conversations.inputs)
            ),
            chat=Chat(
                template_hash(loaded),
                too_long, group_key, dropped, cut, empty, train_index, validation_index, context_only,
            ),
            left_out=left_out,
        )  # fmt: skip
        publish(folder, target, manifest)
    unread += conversations.unread
    if unread and progress:
        most = sorted(sorted(unread), key=lambda name: -unread[name])[:_LISTED]
        listed = ", ".join(f"{printable(name):.60} ({unread[name]:,})" for name in sorted(most))
        more = f" and {len(unread) - _LISTED:,} more keys" if len(unread) > _LISTED else ""
        print(f"without effect, with the number of conversations: {listed}{more}", file=sys.stderr)
    return manifest


def _groups(conversations: Conversations) -> Iterator[str]:
    """Yields the groups of the conversations, and then checks that not too many lines are bad."""
    yield from (each.group for each in conversations)
    conversations.faults.checked(conversations.good, "conversations")


def _write(
    encoded: Encoded, chosen: Sequence[Conversation], below: int, writers: Sequence[PairWriter], totals: np.ndarray
) -> None:
    """Adds a tokenised batch to the writers (train, validation) and to the counts per input."""
    for conversation, pairs in zip(chosen, encoded.pairs, strict=True):
        writers[text_hash(conversation.group) < below].add(pairs)
        totals[conversation.source] += bool(pairs), sum(p.length for p in pairs), sum(p.bytes for p in pairs)


def _batches(conversations: Conversations, sequence_length: int, too_long: str) -> Iterator[ChatBatch]:
    """Yields batches of conversations for the workers; the tag is the number of bytes of the input that were read."""
    chosen: list[Conversation] = []

    def batch() -> ChatBatch:
        return ChatBatch([*chosen], sequence_length, too_long, conversations.position)

    for conversation in conversations:
        chosen.append(conversation)
        if len(chosen) == _BATCH:
            yield batch()
            chosen.clear()
    if chosen:
        yield batch()
