"""Decides which prepared sets a run reads, and opens them for training and for validation."""

import dataclasses
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from llada_jax.config import Config, UserError
from llada_jax.data.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_FOLDER, Manifest, load_manifest
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.read import remote
from llada_jax.data.read.chat import ChatData, held_out_answers
from llada_jax.data.read.pipeline import Data, TrainingData, validation_rows
from llada_jax.data.rows import HeldOut
from llada_jax.devices import distributed
from llada_jax.devices.distributed import log
from llada_jax.diffusion.forward import is_chat
from llada_jax.storage import objects
from llada_jax.storage.objects import Place
from llada_jax.storage.ranges import IN_FLIGHT
from llada_jax.text.tokenizer import Tokenizer, load_tokenizer

SET = "data"  # the folder of a workdir that text is prepared into


@dataclasses.dataclass(frozen=True)
class PreparedSets:
    """The prepared sets of a run, on this host."""

    paths: list[str]  # folders of this host, and addresses of sets that are read in place
    manifests: list[Manifest]  # one for each path
    tokenizer: Tokenizer  # the tokenizer that all sets were prepared with
    tokenizer_folder: str  # the folder of this host that holds the tokenizer's files

    @property
    def template_sha256(self) -> str | None:
        """The hash of the chat template that conversations were prepared with; None for sets of text."""
        chat = self.manifests[0].chat
        return chat.template_sha256 if chat else None

    def identity(self, config: Config) -> dict:
        """Returns what two runs must share, beyond their settings, to be the same run: hashes of data and tokenizer."""
        return {
            "data": [manifest.sha256 for manifest in self.manifests],
            "weights": list(config.data.weights),
            "tokenizer": self.tokenizer.sha256,
        }


def find_sets(
    config: Config,
    workdir: Place,
    earlier: Config | None,
    told: Collection[str] = (),
    working_copy: Path | None = None,
) -> PreparedSets:
    """Finds the prepared sets of a run. Text given as config.data.input is prepared into the workdir first.

    All processes of the run must call this. Remote sets that are not read in place are copied to each host.

    Args:
      config: The configuration of the run.
      workdir: The workdir of the run.
      earlier: The configuration with which the run was started before; None for a new run.
      told: The notes of the tokenizer that the user has read already, so that they are not repeated.
      working_copy: For a workdir in a bucket, the folder on this machine in which text is prepared before the set is
        uploaded to the workdir.

    Raises:
      UserError: If a set is missing or damaged, if the text cannot be prepared, or if it was prepared or trained on
        with other settings than these.
    """
    tells = not prepares_with(config, workdir)  # otherwise the preparation tells the notes of the tokenizer
    paths = distributed.first_decides("prepared sets", lambda: _paths(config, workdir, earlier, working_copy))
    if any(map(objects.is_bucket, paths)):
        paths = [_reachable(path, config) for path in paths]
        tokenizer_folder = remote.local_tokenizer(paths[0], config.data.cache)
        distributed.barrier("copied")  # hosts copy at different speeds, and later waits are shorter than that
    else:
        tokenizer_folder = os.path.join(paths[0], TOKENIZER_FOLDER)
    sets = PreparedSets(
        paths, [remote.manifest_of(path) for path in paths], load_tokenizer(tokenizer_folder), tokenizer_folder
    )
    if sets.tokenizer.sha256 != sets.manifests[0].tokenizer_sha256:
        remedy = "; if it was prepared without the BOS in front of its texts, prepare it again"
        raise UserError(
            f"{sets.tokenizer_folder} is not the tokenizer that the set was prepared with"
            + (remedy if sets.tokenizer.prefix else "")
        )
    _check_ids(sets)
    for note in sets.tokenizer.notes if tells else ():
        if note not in told:
            log(f"{sets.tokenizer_folder}: {note}")
    return sets


def _reachable(path: str, config: Config) -> str:
    """Returns where this host reads a set: the path itself, or the folder of a copy that is made first."""
    if not objects.is_bucket(path):
        return path
    if not remote.read_in_place(path, config.data.copy):
        if not config.data.copy:
            log(f"{path}: rows can be read in place in gs:// and s3:// only, so this host copies the set")
        return remote.local_copy(path, config.data.cache, log)
    manifest = remote.manifest_of(path)
    log(
        f"{path}: rows are read in place, by up to {IN_FLIGHT} requests at a time; config.data.copy=True copies the set"
    )
    if not all(shard.index_sha256 for name in SPLITS for shard in manifest.split(name).shards):
        log(
            f"{path}: the set has no row indices, so they are made from its shards, and a damaged row is found only if "
            "it cannot be decoded; prepare the set again to have a checksum for each row"
        )
    return path


def _check_ids(sets: PreparedSets) -> None:
    """Raises UserError if sets of one tokenizer were prepared with the ids of different models."""
    tokenizer = sets.tokenizer
    for path, manifest in zip(sets.paths, sets.manifests, strict=True):
        names = ["eos_id", *(["bos_id", "eot_id"] if manifest.chat else [])]
        # MASK is in no row, unless it is also a token of text.
        names += ["mask_id"] if any(map(tokenizer.is_text, (manifest.mask_id, tokenizer.mask_id))) else []
        for name in names:
            if (theirs := getattr(manifest, name)) != (ours := getattr(tokenizer, name)):
                raise UserError(
                    f"{path} was prepared with {name}={theirs}, but {sets.paths[0]} with {ours}: prepare both with the "
                    "same --tokenizer"
                )


def _paths(config: Config, workdir: Place, earlier: Config | None, working_copy: Path | None) -> list[str]:
    """Returns the folders of the prepared sets. If config.data.input is set, it is prepared first."""
    data = config.data
    if data.path:
        return [path.strip() for path in data.path.split(",") if path.strip()]
    target = workdir / SET
    inputs = [item.strip() for item in data.input.split(",") if item.strip()]
    if _is_prepared(workdir):
        _check_prepared(config, inputs, target, load_manifest(target), earlier)
        return [str(target)]
    if earlier and earlier.data.input != data.input:
        before = earlier.data.input or f"config.data.path={earlier.data.path}"
        raise UserError(f"config.data.input is {data.input}, but {workdir} was trained on {before}: set it back")
    log(f"preparing {data.input} in {target}")
    upload_to = target if objects.is_bucket(target) else None
    if upload_to:
        target = working_copy / SET
    tokenizer = _tokenizer_source(config)
    same = {
        "sequence_length": config.sequence_length,
        "validation_fraction": data.validation_fraction,
        "workers": data.workers,
    }
    if is_chat(config):
        chat = prepare_chat(inputs, target, tokenizer=tokenizer, **same).chat
        log(
            f"answers left out: {chat.dropped:,} too long (llada_jax.prepare --chat can cut them), {chat.empty:,} "
            f"empty, {chat.context_only:,} marked as not to be learned"
        )
    else:
        trained = None if tokenizer else data.train_tokenizer
        prepare(inputs, target, tokenizer=tokenizer or None, train_tokenizer=trained, **same)
    if upload_to:
        objects.upload(target, upload_to, last=MANIFEST_FILE)
        shutil.rmtree(target)
    return [str(upload_to or target)]


def _is_prepared(workdir: Place) -> bool:
    """Returns whether text was prepared into a workdir."""
    target = workdir / SET
    return objects.exists(target / MANIFEST_FILE) if objects.is_bucket(target) else target.exists()


def prepares_with(config: Config, workdir: Place) -> str:
    """Returns the tokenizer with which `find_sets` will prepare config.data.input; "" if it takes or trains another."""
    if config.data.path or not config.data.input or _is_prepared(workdir):
        return ""
    return config.data.tokenizer or (config.init_from if is_chat(config) else "")


def _tokenizer_source(config: Config) -> str:
    """Returns the tokenizer that config.data.input is prepared with. "" means that one is trained on the text.

    Conversations are prepared with the tokenizer of the model that is tuned.
    """
    if not is_chat(config):
        return config.data.tokenizer
    if not (source := config.data.tokenizer or config.init_from):
        raise UserError(
            "config.data.tokenizer is missing: set config.init_from, or name the tokenizer of the model to tune"
        )
    return source


def open_training(config: Config, paths: list[str]) -> Data:
    """Opens the rows that a run trains on.

    Raises:
      UserError: As `pipeline.TrainingData`, or if the sets do not suit the objective of the run.
    """
    same = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "sequence_length": config.sequence_length,
        "vocab_size": config.model.vocab_size,
        "copies": 2 if config.diffusion.complementary else 1,
        "cache": config.data.cache,
    }
    if is_chat(config):
        return ChatData(paths, config.data.weights, **same)
    return TrainingData(paths, config.data.weights, random_length_every=config.diffusion.random_length_every, **same)


def open_held_out(config: Config, paths: list[str]) -> HeldOut | None:
    """Opens the rows that a run is validated on. Returns None if it is not validated, or if no rows are held out."""
    if not config.validation.rows:
        return None
    take = held_out_answers if is_chat(config) else validation_rows
    rows = take(paths, config.validation.rows, config.sequence_length, config.model.vocab_size, config.data.cache)
    return rows if len(rows.tokens_NT) else None


def _check_prepared(
    config: Config, inputs: list[str], target: Place, manifest: Manifest, earlier: Config | None
) -> None:
    """Raises UserError if the set in the workdir was prepared with other settings than these."""
    data = config.data
    pairs = [
        ("data.input", ",".join(inputs), ",".join(source.input for source in manifest.sources)),
        ("data.validation_fraction", data.validation_fraction, manifest.validation_fraction),
        ("sequence_length", config.sequence_length, manifest.sequence_length),
    ]
    tokenizer = _tokenizer_source(config)
    before = earlier and _tokenizer_source(earlier)
    if not tokenizer:
        pairs.append(("data.train_tokenizer", data.train_tokenizer, manifest.tokenizer_size))
        if earlier:
            pairs.append(("data.tokenizer", "''", repr(before)))
    elif before != tokenizer:  # the file of an unchanged tokenizer may be gone by now: the set has a copy
        pairs.append(("data.tokenizer", load_tokenizer(tokenizer).sha256, manifest.tokenizer_sha256))
    remedy = "set it back or take another --workdir"
    for name, wanted, found in pairs:
        if wanted != found:
            raise UserError(
                f"config.{name} is {wanted}, but {target} was prepared with {found}: {remedy}"
                + ("" if earlier else ", or remove that folder to prepare it again")
            )
