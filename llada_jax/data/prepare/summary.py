"""Makes the summary that `prepare` prints at its end: the sizes of the set, and the next command."""

import os
import shlex

from llada_jax.data.manifest import Manifest


def text_summary(output: str, manifest: Manifest, seconds: float) -> str:
    """Returns the lines about a set of text.

    Args:
      output: The folder of the set.
      manifest: The manifest of the set.
      seconds: How long the preparation took, in seconds.
    """
    train, validation = manifest.train, manifest.validation
    tokens = train.tokens + validation.tokens
    return (
        f"{output}: {train.rows:,} rows to train on and {validation.rows:,} held out, of {manifest.sequence_length:,} "
        f"tokens\n"
        f"{tokens:,} tokens, {(train.bytes + validation.bytes) / tokens:.2f} bytes per token, "
        f"vocabulary {manifest.tokenizer_size:,}, {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)\n"
        f"{_left_out(manifest)}{_filtered(manifest)}"
        f"next: {_next_command(output, manifest.sequence_length)}"
    )


def chat_summary(output: str, manifest: Manifest, tokenizer: str, seconds: float) -> str:
    """Returns the lines about a set of conversations.

    Args:
      output: The folder of the set.
      manifest: The manifest of the set.
      tokenizer: The tokenizer as the user gave it. If it is a folder, it holds the model to tune.
      seconds: How long the preparation took, in seconds.
    """
    train, validation, chat = manifest.train, manifest.validation, manifest.chat
    marked = f"marked as not to be learned: {chat.context_only:,} are context only\n" if chat.context_only else ""
    return (
        f"{output}: {train.rows:,} answers of {train.documents:,} conversations to train on, {validation.rows:,} of "
        f"{validation.documents:,} held out\n"
        f"longer than {manifest.sequence_length:,} tokens: {chat.dropped:,} answers left out, {chat.cut:,} cut; "
        f"without text: {chat.empty:,} left out\n"
        f"{marked}{_left_out(manifest)}"
        f"{train.tokens + validation.tokens:,} tokens, an epoch is {train.documents:,} rows, {seconds:.1f} s\n"
        f"next: python -m llada_jax.train --config=configs/small_sft.py --workdir=runs/tuned "
        f"--config.init_from={shlex.quote(tokenizer) if os.path.isdir(tokenizer) else 'MODEL'} "
        f"--config.data.path={shlex.quote(output)} --config.sequence_length={manifest.sequence_length}"
    )


def _left_out(manifest: Manifest) -> str:
    """Returns the lines about what was left out because it is bad: each kind with its first examples."""
    lines = []
    for kind in manifest.left_out:
        lines.append(f"left out, {kind.kind}: {kind.count:,}")
        lines += [f"  {example}" for example in kind.examples]
    return "".join(f"{line}\n" for line in lines)


def _filtered(manifest: Manifest) -> str:
    """Returns the lines about what the filters left out: the counts of each input, then examples of each reason."""
    if manifest.filtered is None:
        return ""
    lines = []
    for source in manifest.filtered.sources:
        removed = sum(source.removed.values())
        more = f"; {source.lines:,} lines of others" if source.lines else ""
        lines.append(f"filtered, {source.input}: {removed:,} of {source.documents:,} documents left out{more}")
        for reason, count in sorted(source.removed.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  {count:,}  {reason}")
    for reason, examples in manifest.filtered.examples.items():
        lines.append(f"for example, {reason}: {examples[0]}")
    return "".join(f"{line}\n" for line in lines)


def _next_command(output: str, sequence_length: int) -> str:
    return (
        "python -m llada_jax.train --config=configs/quickstart.py --workdir=runs/first "
        f"--config.data.input= --config.data.path={shlex.quote(output)} --config.sequence_length={sequence_length}"
    )
