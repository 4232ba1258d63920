"""Which prepared sets a run reads: those it is given, or the one made of its text in its workdir."""

from pathlib import Path

from llada_jax.config import Config, UserError
from llada_jax.data.manifest import Manifest, load_manifest
from llada_jax.data.prepare import prepare
from llada_jax.distributed import log
from llada_jax.tokenizer import load_tokenizer


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
    prepare(
        inputs,
        target,
        tokenizer=data.tokenizer or None,
        train_tokenizer=None if data.tokenizer else data.train_tokenizer,
        sequence_length=config.sequence_length,
        validation_fraction=data.validation_fraction,
        workers=data.workers,
    )
    return [str(target)]


def _check_prepared(config: Config, inputs: list[str], target: Path, manifest: Manifest, stored: Config | None) -> None:
    """UserError if the set in the workdir was prepared with other settings than these."""
    data = config.data
    pairs = [
        ("data.input", ",".join(inputs), ",".join(source.input for source in manifest.sources)),
        ("data.validation_fraction", data.validation_fraction, manifest.validation_fraction),
        ("sequence_length", config.sequence_length, manifest.sequence_length),
    ]
    if not data.tokenizer:
        pairs.append(("data.train_tokenizer", data.train_tokenizer, manifest.tokenizer_size))
        if stored:
            pairs.append(("data.tokenizer", "''", repr(stored.data.tokenizer)))
    elif not stored or stored.data.tokenizer != data.tokenizer:  # else the file may be gone: the set has its own
        pairs.append(("data.tokenizer", load_tokenizer(data.tokenizer).sha256, manifest.tokenizer_sha256))
    remedy = "set it back or take another --workdir"
    for name, wanted, found in pairs:
        if wanted != found:
            raise UserError(
                f"config.{name} is {wanted}, but {target} was prepared with {found}: {remedy}"
                + ("" if stored else ", or remove that folder to prepare it anew")
            )
