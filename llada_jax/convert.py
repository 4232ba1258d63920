"""Change the format of a model: python -m llada_jax.convert --input=DIR --output=DIR --format=huggingface|orbax

The input is a training workdir, a published folder or what this wrote. The output is a published folder
(huggingface), or a workdir with weights alone (orbax) for --model=DIR and --config.init_from=DIR. No bit of a weight
changes unless --dtype asks for it. It runs on the host, which must have the memory for all parameters: once for
published to published, up to twice where orbax reads or writes them (float16 and mixed ones are float32 on the way).
"""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from llada_jax.cli import entry_point
from llada_jax.config import CheckpointConfig, Config, UserError
from llada_jax.devices import mesh as meshes
from llada_jax.diffusion.forward import is_chat
from llada_jax.formats import huggingface, published, tensor_files
from llada_jax.formats.folders import KEPT, as_json, check_output, is_workdir, other_files, put_files, whole_folder
from llada_jax.formats.published import CONFIG
from llada_jax.loading import fitted, with_tokenizer
from llada_jax.model.transformer import Transformer, split
from llada_jax.text.tokenizer import Tokenizer, find_tokenizer
from llada_jax.training import checkpoint, workdir

_INPUT = flags.DEFINE_string("input", None, "A training workdir, a published folder, or what convert wrote.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write: new or empty.")
_FORMAT = flags.DEFINE_enum("format", None, ["huggingface", "orbax"], "What to write.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of a workdir; default: its newest.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of the weights; default: as they are.")
_NAMING = flags.DEFINE_enum("naming", None, ["llada", "llama"], "Of the tensors; default: the input's own, or llada.")
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Gigabytes (10^9 bytes) of tensors per file at most.")


def main() -> None:
    """Does what the flags say."""
    for flag in (_INPUT, _OUTPUT, _FORMAT):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: --input=DIR, --output=DIR and --format are needed")
    if not 1e-9 <= _SHARD_GB.value < math.inf:
        raise UserError(f"--shard_gb={_SHARD_GB.value}: a positive number of gigabytes is needed")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and the host has more memory than one device
    convert(
        _INPUT.value,
        _OUTPUT.value,
        _FORMAT.value,
        step=_STEP.value,
        dtype=_DTYPE.value,
        naming=_NAMING.value,
        shard_bytes=int(_SHARD_GB.value * 10**9),
        progress=True,
    )
    print(f"{_OUTPUT.value} is written", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model folder, known without its weights."""

    path: Path
    step: int | None  # None = a published folder
    config: Config  # of the run; of a published folder only model and sequence_length are its own
    identity: dict  # of the run's data and tokenizer
    tokenizer: Path  # where its files are, if there are any
    dtype: str  # of the weights, as they are held here: float32 or bfloat16
    naming: str  # of the tensors
    kept: Path | None  # where config.json and other files of a published folder are
    kept_dtype: str  # of the weights that this config.json was published with; "" if not known, or of several
    dtypes: dict[str, str]  # of the tensors that were published in another one, by their names in `naming`


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
    """Writes the model in one folder to another; whole or not at all.

    From a published folder to "orbax" and back, config fields, other files (those in subfolders too; weights in other
    formats are left out, and told of), and dtype and bits of all weights are the same. A model tuned here from a
    published folder keeps that folder's config fields and files; only its max_sequence_length grows with the rows.
    For any other model trained here "huggingface" writes a complete config.json and generation_config.json in LLaDA's
    fields, the tokenizer and the chat template; this package reads the same ids from it. Others: transformers (5.23
    was tried) reads the same ids and chats from a SentencePiece tokenizer, whose tokenizer_config.json names the
    control tokens that were appended to it. Of a tokenizer.json that lacked some, others do not know those: no file
    names them. The model itself needs the code published with LLaDA-8B, see `published.published_config`; that was
    not tried.

    Args:
      source: a training workdir, a published folder, or what this wrote.
      output: a new or empty folder.
      form: "huggingface" or "orbax".
      step: of a workdir's checkpoint. None = its newest.
      dtype: "float32" or "bfloat16", of all. None = as each of the weights is.
      naming: of the tensors, "llada" or "llama". None = that of the published folder, or "llada".
      shard_bytes: of tensors per file at most.
      progress: whether to report on stderr.

    Raises:
      UserError: an argument that is none, no such model, one that cannot be used, an output that exists; all before a
        weight is read. Or an output that cannot be written.
    """
    choices = {
        "format": (form, ("huggingface", "orbax")),
        "dtype": (dtype, (None, "float32", "bfloat16")),
        "naming": (naming, (None, *published.NAMINGS)),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"{name}={value!r}: choose {' or '.join(filter(None, known))}")
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}: a positive integer is needed")
    check_output(output)
    found = _source(Path(source), step)
    if form == "orbax" and naming not in (None, found.naming):
        raise UserError("naming is for format=huggingface: in orbax tensors have our own names")
    tokenizer = fitted(find_tokenizer(found.tokenizer), found.config.model, found.path)
    if dtype is not None:
        found = dataclasses.replace(found, dtype=dtype, dtypes={})
    with jax.set_mesh(meshes.one_device_mesh()):
        model = _load(found, tokenizer, progress)
        if form == "huggingface":
            _write_published(found, tokenizer, model, output, naming or found.naming, shard_bytes, progress)
        else:
            _write_workdir(found, tokenizer, model, output)
    left_out = [] if found.kept is None else other_files(found.kept)[1]
    left_out = [name for name in left_out if not name.endswith((".safetensors", tensor_files.INDEX)) or "/" in name]
    if progress and left_out:
        print(f"left out, weights in other formats: {', '.join(left_out)}", file=sys.stderr)


def _source(path: Path, step: int | None) -> Source:
    if is_workdir(path, "input "):
        step = checkpoint.choose_step(path, step)
        config, identity = workdir.read_config(path)
        record = checkpoint.weights_record(path, step) or {}
        kept = path / KEPT if (path / KEPT / CONFIG).is_file() else None
        dtype, naming = record.get("dtype", "float32"), record.get("naming", "llada")
        fields = published.read_json(kept / CONFIG) if kept else {}
        if kept and "naming" not in record and not published.own_names("llada") & fields.keys():
            naming = "llama"  # tuned here from a folder with those names
        kept_dtype, dtypes = record.get("published_dtype", ""), record.get("dtypes", {})
        return Source(path, step, config, identity, path / "tokenizer", dtype, naming, kept, kept_dtype, dtypes)
    if step is not None:
        raise UserError(f"step={step}: {path} is not a training workdir, it has no steps")
    found = huggingface.inspect(path)
    config = Config(model=found.config)
    config.sequence_length = published.sequence_length(found.fields) or config.sequence_length
    kinds = set(found.dtypes.values())
    kept_dtype = kinds.pop() if len(kinds) == 1 else ""
    dtypes = {name: dtype for name, dtype in found.dtypes.items() if dtype != found.dtype}
    return Source(path, None, config, {}, path, found.dtype, found.naming, path, kept_dtype, dtypes)


def _load(source: Source, tokenizer: Tokenizer | None, progress: bool) -> Transformer:
    if source.step is None:
        update = lambda config: with_tokenizer(config, tokenizer)  # noqa: E731
        return huggingface.load_model(source.path, source.dtype, update, progress)
    return checkpoint.load_model(source.path, source.step, jax.sharding.get_mesh(), source.dtype)


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
    if source.kept is not None:
        fields = published.read_json(source.kept / CONFIG)
        if not source.dtypes and source.dtype != source.kept_dtype:
            fields |= {name: source.dtype for name in ("torch_dtype", "dtype") if name in fields}
        # A model that was tuned on longer rows than it was published with can do those too.
        for name in ("max_sequence_length", "max_position_embeddings"):
            if published.sequence_length(fields) == fields.get(name, 0) < source.config.sequence_length:
                fields[name] = source.config.sequence_length
        files = dict(other_files(source.kept)[0])
        if tokenizer is not None and find_tokenizer(source.kept) is None:
            files |= _tokenizer_files(source.tokenizer, tokenizer)
        elif tokenizer and tokenizer.chat_template is None and is_chat(source.config):
            files["chat_template.jinja"] = tokenizer.default_chat_template.encode()  # what it has learned to answer to
    else:
        fields = published.published_config(model.config, naming, source.dtype, source.config.sequence_length)
        files = {huggingface.GENERATION_CONFIG: as_json(_generation_config(model, fields))}
        if tokenizer is not None:
            files |= _tokenizer_files(source.tokenizer, tokenizer)
    pairs = zip(*(published.published_tensors(model.config, each) for each in (source.naming, naming)), strict=True)
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
            tokenizer.save(folder / "tokenizer")
        if source.kept is not None:
            put_files(folder / KEPT, other_files(source.kept)[0])
        try:
            checkpoints = checkpoint.Checkpoints(folder, CheckpointConfig())
            record = {"naming": source.naming, "published_dtype": source.kept_dtype, "dtypes": source.dtypes}
            checkpoints.save_weights(source.step or 0, split(model)[1], record)
            checkpoints.close()
        except checkpoint.SaveFailed as error:
            raise UserError(f"output {output} is not written: {error}") from error


def _generation_config(model: Transformer, fields: Mapping[str, Any]) -> dict[str, Any]:
    ids = {
        "bos_token_id": model.config.bos_id,
        "eos_token_id": model.config.eos_id,
        "pad_token_id": model.config.eos_id,
    }
    known = {name: value for name, value in ids.items() if value is not None}
    versions = {name: fields[name] for name in ("transformers_version",) if name in fields}
    return {"_from_model_config": True, **known, **versions}


def _tokenizer_files(folder: Path, tokenizer: Tokenizer) -> dict[str, bytes | Path]:
    files: dict[str, bytes | Path] = {path.name: path for path in folder.iterdir() if path.is_file()}
    if tokenizer.chat_template is None:
        files["chat_template.jinja"] = tokenizer.default_chat_template.encode()
    if tokenizer.kind == "sentencepiece":
        files.setdefault("tokenizer_config.json", as_json(_sentencepiece_config(tokenizer)))
    return files


def _sentencepiece_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers needs to know beside tokenizer.model."""
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


if __name__ == "__main__":
    entry_point.run(main)
