"""Converts models between two formats: a training workdir, and a folder in the published format."""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from llada_jax.cli.outputs import check_folder, whole_folder
from llada_jax.config import Config, UserError
from llada_jax.devices import mesh as meshes
from llada_jax.diffusion.forward import is_chat
from llada_jax.formats import FORMATS, huggingface, published, tensor_names, weights, workdir
from llada_jax.formats.arrays import SaveFailed
from llada_jax.formats.companions import companion_files, put_files
from llada_jax.formats.generation_config import generation_config
from llada_jax.formats.published import CONFIG, as_json
from llada_jax.model.transformer import Transformer, split
from llada_jax.storage import objects
from llada_jax.storage.objects import Place
from llada_jax.text.agreement import fitted, notes_of, with_tokenizer
from llada_jax.text.named_ids import GENERATION_CONFIG
from llada_jax.text.tokenizer import Tokenizer, find_tokenizer


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of a model folder before its weights are read."""

    path: Place
    step: int | None  # the step of a workdir's checkpoint; None for a published folder
    config: Config  # the configuration; for a published folder only `model` and `sequence_length` are known
    identity: dict  # the hashes of the run's data and tokenizer; {} for a published folder
    tokenizer: Path  # the folder on this machine with the tokenizer's files, if there are any
    dtype: str  # the dtype in which the weights are held in memory: float32 or bfloat16
    naming: str  # the naming of the tensors: llada or llama
    companions: Path | None  # the folder that holds the companion files of a published folder
    published_dtype: str  # the dtype in which the weights were published; "" if unknown or mixed
    dtypes: dict[str, str]  # tensors that were published in another dtype than `dtype`, by their names in `naming`
    notes: list[str]  # lines that say what in the folder is not used


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    form: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    naming: str | None = None,
    shard_bytes: int = huggingface.SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes the model in one folder to another folder, whole or not at all.

    From a published folder to "orbax" and back, the config fields, the companion files (those in subfolders too) and
    the dtype and bits of all weights stay the same. Files with weights that are not the model's are left out and
    reported, and so is the head of a model with tied embeddings, which equals the embedding. A model that was tuned
    here from a published folder keeps that folder's config fields and companion files; only its max_sequence_length
    grows with the training rows.

    For any other model trained here, "huggingface" writes a complete config.json and generation_config.json with
    LLaDA's field names, the tokenizer and the chat template, from which this package reads the same ids. transformers
    (5.23 was tried) reads the same ids and chats from a SentencePiece tokenizer, whose tokenizer_config.json names the
    control tokens that were appended to it. It does not know the control tokens that were appended to a tokenizer.json,
    because no file names them. The model itself needs the code published with LLaDA-8B, see
    `published.published_config`; that was not tried.

    Args:
      source: A training workdir, a published folder, or a folder that this function wrote.
      output: A new or empty folder. It may lie in a bucket (gs:// or s3://): everything is then written into a
        temporary folder first, and uploaded.
      form: "huggingface" or "orbax".
      step: The step of a workdir's checkpoint. None means the newest.
      dtype: The dtype of all weights, "float32" or "bfloat16". None keeps the dtype of each tensor.
      naming: The naming of the tensors, "llada" or "llama". None means the naming of the published folder,
        or "llada".
      shard_bytes: The largest number of bytes of tensors per file.
      progress: Whether to report progress on stderr.

    Raises:
      UserError: If an argument is impossible, if there is no usable model in `source`, or if `output` exists. These
        mistakes are found before a weight is read. Also raised if the output cannot be written.
    """
    choices = {
        "format": (form, FORMATS),
        "dtype": (dtype, (None, "float32", "bfloat16")),
        "naming": (naming, (None, *tensor_names.NAMINGS)),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"{name}={value!r}: choose {' or '.join(filter(None, known))}")
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}: a positive integer is needed")
    if objects.is_bucket(output):
        _convert_into_bucket(source, output, form, step, dtype, naming, shard_bytes, progress)
        return
    check_folder(output)
    found = _source(objects.place(source), step)
    if form == "orbax" and naming not in (None, found.naming):
        raise UserError("naming is for format=huggingface: leave it out for format=orbax")
    tokenizer = fitted(find_tokenizer(found.tokenizer), found.config.model, found.path)
    if progress:
        for note in (*found.notes, *notes_of(tokenizer, found.tokenizer)):
            print(note, file=sys.stderr)
    if dtype is not None:
        found = dataclasses.replace(found, dtype=dtype, dtypes={})
    with jax.set_mesh(meshes.one_device_mesh()):
        model = _load(found, tokenizer, progress)
        if form == "huggingface":
            _write_published(found, tokenizer, model, output, naming or found.naming, shard_bytes, progress)
        else:
            _write_workdir(found, tokenizer, model, output)


def _convert_into_bucket(
    source: str | os.PathLike, output: str | os.PathLike, form: str, step: int | None, *settings: Any
) -> None:
    """Converts into a temporary folder on this machine, and uploads what is in it."""
    objects.check(output, "output ")
    if objects.names(output):
        raise UserError(f"output {output} exists: name another folder, or remove its objects")
    objects.require_bucket(output)
    dtype, naming, shard_bytes, progress = settings
    with tempfile.TemporaryDirectory(prefix="llada_jax-") as temporary:
        folder = Path(temporary) / "output"
        options = {"step": step, "dtype": dtype, "naming": naming, "shard_bytes": shard_bytes, "progress": progress}
        convert(source, folder, form, **options)
        last = CONFIG
        for saved in workdir.steps_in(folder):
            last = f"{workdir.CHECKPOINTS}/{saved}/{workdir.COMPLETE}"
            (folder / last).write_text("written by llada_jax.convert")
        objects.upload(folder, output, last)


def _source(path: Place, step: int | None) -> Source:
    if workdir.is_workdir(path, "input "):
        return _from_workdir(path, workdir.choose_step(path, step))
    if step is not None:
        raise UserError(f"step={step}: {path} is not a training workdir and has no steps: leave step out")
    path = workdir.local_files(path, lambda line: print(line, file=sys.stderr))
    found = huggingface.inspect(path)
    config = Config(model=found.config)
    config.sequence_length = published.sequence_length(found.fields) or config.sequence_length
    kinds = set(found.dtypes.values())
    return Source(
        path=path,
        step=None,
        config=config,
        identity={},
        tokenizer=path,
        dtype=found.dtype,
        naming=found.naming,
        companions=path,
        published_dtype=kinds.pop() if len(kinds) == 1 else "",
        dtypes={name: dtype for name, dtype in found.dtypes.items() if dtype != found.dtype},
        notes=found.notes,
    )


def _from_workdir(path: Place, step: int) -> Source:
    files = workdir.local_files(path, lambda line: print(line, file=sys.stderr))
    config, identity = workdir.read_config(path)
    record = weights.weights_record(path, step) or {}
    kept = files / workdir.PUBLISHED_FILES
    companions = kept if (kept / CONFIG).is_file() else None
    naming = record.get("naming", tensor_names.naming_of(config.model))
    fields = published.read_json(companions / CONFIG) if companions else {}
    if companions and "naming" not in record and not published.own_names("llada") & fields.keys():
        naming = "llama"  # the run started from a published folder with Llama's names
    return Source(
        path=path,
        step=step,
        config=config,
        identity=identity,
        tokenizer=files / workdir.TOKENIZER,
        dtype=record.get("dtype", "float32"),
        naming=naming,
        companions=companions,
        published_dtype=record.get("published_dtype", ""),
        dtypes=record.get("dtypes", {}),
        notes=[],
    )


def _load(source: Source, tokenizer: Tokenizer | None, progress: bool) -> Transformer:
    if source.step is None:
        update = lambda config: with_tokenizer(config, tokenizer)  # noqa: E731
        return huggingface.load_model(source.path, source.dtype, update, progress)
    return weights.load_model(source.path, source.step, jax.sharding.get_mesh(), source.dtype)


def _write_published(
    source: Source,
    tokenizer: Tokenizer | None,
    model: Transformer,
    output: str | os.PathLike,
    naming: str,
    shard_bytes: int,
    progress: bool,
) -> None:
    files: dict[str, bytes | Path]
    if source.companions is not None:
        fields = published.read_json(source.companions / CONFIG)
        if not source.dtypes and source.dtype != source.published_dtype:
            fields |= {name: source.dtype for name in ("torch_dtype", "dtype") if name in fields}
        # A model that was tuned on rows longer than its published limit can process these rows too.
        for name in ("max_sequence_length", "max_position_embeddings"):
            if published.sequence_length(fields) == fields.get(name, 0) < source.config.sequence_length:
                fields[name] = source.config.sequence_length
        files = dict(companion_files(source.companions)[0])
        if tokenizer is not None and find_tokenizer(source.companions) is None:
            files |= _tokenizer_files(source.tokenizer, tokenizer)
        elif tokenizer and tokenizer.chat_template is None and is_chat(source.config):
            files["chat_template.jinja"] = tokenizer.default_chat_template.encode()  # the model was tuned with it
    else:
        fields = published.published_config(model.config, naming, source.dtype, source.config.sequence_length)
        files = {GENERATION_CONFIG: generation_config(model.config, fields)}
        if tokenizer is not None:
            files |= _tokenizer_files(source.tokenizer, tokenizer)
    pairs = zip(*(tensor_names.published_tensors(model.config, each) for each in (source.naming, naming)), strict=True)
    dtypes = {new.name: source.dtypes[old.name] for old, new in pairs if old.name in source.dtypes}
    huggingface.save_model(
        model,
        output,
        dtypes=dtypes,
        naming=naming,
        original=fields,
        files=files,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _write_workdir(source: Source, tokenizer: Tokenizer | None, model: Transformer, output: str | os.PathLike) -> None:
    config = dataclasses.replace(source.config, model=model.config)
    identity = source.identity or {"data": [], "weights": [], "tokenizer": tokenizer and tokenizer.sha256}
    with whole_folder(output) as folder:
        workdir.write_config(folder, config, identity)
        if tokenizer is not None:
            tokenizer.save(folder / workdir.TOKENIZER)
        if source.companions is not None:
            put_files(folder / workdir.PUBLISHED_FILES, companion_files(source.companions)[0])
        record = {"naming": source.naming, "published_dtype": source.published_dtype, "dtypes": source.dtypes}
        try:
            weights.save_weights(folder, source.step or 0, split(model)[1], record)
        except SaveFailed as error:
            raise UserError(f"output {output} cannot be written: {error}") from error


def _tokenizer_files(folder: Path, tokenizer: Tokenizer) -> dict[str, bytes | Path]:
    files: dict[str, bytes | Path] = {path.name: path for path in folder.iterdir() if path.is_file()}
    if tokenizer.chat_template is None:
        files["chat_template.jinja"] = tokenizer.default_chat_template.encode()
    if tokenizer.kind == "sentencepiece":
        files.setdefault("tokenizer_config.json", as_json(_sentencepiece_config(tokenizer)))
    return files


def _sentencepiece_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the tokenizer_config.json that transformers needs beside a tokenizer.model."""
    flags_of_token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": tokenizer.roles[role][1] for role in ("bos", "eos", "mask")},
        "pad_token": tokenizer.roles["eos"][1],
        "added_tokens_decoder": {str(i): {"content": name, **flags_of_token} for i, name in tokenizer.roles.values()},
    }
