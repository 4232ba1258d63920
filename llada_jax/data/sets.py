"""Which prepared sets a run reads: those it is given, or the one made of its text in its workdir; and as what."""

from pathlib import Path

from llada_jax.config import Config, UserError
from llada_jax.data.manifest import Manifest, load_manifest
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.read.chat import ChatData, held_out_answers
from llada_jax.data.read.pipeline import Data, TrainingData, validation_rows
from llada_jax.data.rows import HeldOut
from llada_jax.devices.distributed import log
from llada_jax.diffusion.forward import is_chat
from llada_jax.text.tokenizer import load_tokenizer


def prepared_sets(config: Config, folder: Path, stored: Config | None) -> list[str]:
    """Folders of the prepared sets of a run; text given as config.data.input is prepared into the workdir first.

    Args:
      config: the run.
      folder: its workdir.
      stored: config of the run that has checkpoints there; None if there are none.

    Raises:
      UserError: the text cannot be prepared, or was prepared or trained on with other settings than these.
    """
    data = config.data
    if data.path:
        return [path.strip() for path in data.path.split(",") if path.strip()]
    target = folder / "data"
    inputs = [item.strip() for item in data.input.split(",") if item.strip()]
    if target.exists():
        _check_prepared(config, inputs, target, load_manifest(target), stored)
        return [str(target)]
    if stored and stored.data.input != data.input:
        before = stored.data.input or f"config.data.path={stored.data.path}"
        raise UserError(f"config.data.input is {data.input}, but {folder} was trained on {before}: set it back")
    log(f"preparing {data.input} in {target}")
    tokenizer = _tokenizer_source(config)
    same = {
        "sequence_length": config.sequence_length,
        "validation_fraction": data.validation_fraction,
        "workers": data.workers,
    }
    if is_chat(config):
        chat = prepare_chat(inputs, target, tokenizer=tokenizer, **same).chat
        log(
            f"answers left out: {chat.dropped:,} too long, {chat.empty:,} empty (llada_jax.prepare --chat can cut them)"
        )
    else:
        trained = None if tokenizer else data.train_tokenizer
        prepare(inputs, target, tokenizer=tokenizer or None, train_tokenizer=trained, **same)
    return [str(target)]


def _tokenizer_source(config: Config) -> str:
    """The tokenizer that text is prepared with, "" = one is trained; conversations have that of the model tuned."""
    if not is_chat(config):
        return config.data.tokenizer
    if not (source := config.data.tokenizer or config.init_from):
        raise UserError("config.data.tokenizer: conversations need that of the model which config.init_from tunes")
    return source


def open_training(config: Config, paths: list[str]) -> Data:
    """The rows that a run trains on. UserError as `pipeline.TrainingData`, and if they are not for its objective."""
    same = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "sequence_length": config.sequence_length,
        "vocab_size": config.model.vocab_size,
    }
    if is_chat(config):
        return ChatData(paths, config.data.weights, **same)
    return TrainingData(paths, config.data.weights, random_length_every=config.diffusion.random_length_every, **same)


def open_held_out(config: Config, paths: list[str]) -> HeldOut | None:
    """The rows that a run is validated on; None if it is not, or the sets hold none out."""
    if not config.validation.rows:
        return None
    take = held_out_answers if is_chat(config) else validation_rows
    rows = take(paths, config.validation.rows, config.sequence_length, config.model.vocab_size)
    return rows if len(rows.tokens_NT) else None


def _check_prepared(config: Config, inputs: list[str], target: Path, manifest: Manifest, stored: Config | None) -> None:
    """UserError if the set in the workdir was prepared with other settings than these."""
    data = config.data
    pairs = [
        ("data.input", ",".join(inputs), ",".join(source.input for source in manifest.sources)),
        ("data.validation_fraction", data.validation_fraction, manifest.validation_fraction),
        ("sequence_length", config.sequence_length, manifest.sequence_length),
    ]
    tokenizer = _tokenizer_source(config)
    before = stored and _tokenizer_source(stored)
    if not tokenizer:
        pairs.append(("data.train_tokenizer", data.train_tokenizer, manifest.tokenizer_size))
        if stored:
            pairs.append(("data.tokenizer", "''", repr(before)))
    elif before != tokenizer:  # else the file may be gone: the set has its own
        pairs.append(("data.tokenizer", load_tokenizer(tokenizer).sha256, manifest.tokenizer_sha256))
    remedy = "set it back or take another --workdir"
    for name, wanted, found in pairs:
        if wanted != found:
            raise UserError(
                f"config.{name} is {wanted}, but {target} was prepared with {found}: {remedy}"
                + ("" if stored else ", or remove that folder to prepare it anew")
            )
