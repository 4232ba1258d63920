"""Reads and writes generation_config.json, which names the ids that end a text beside those in config.json."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_jax.config import ModelConfig, UserError
from llada_jax.formats.published import CONFIG, as_json, read_json
from llada_jax.text.json_files import short
from llada_jax.text.named_ids import END_IDS, GENERATION_CONFIG, is_id, listed, others

# Fields that say nothing about how a text is generated here, or say what this package does anyway.
_HARMLESS = {
    "bos_token_id", "pad_token_id", "mask_token_id", "decoder_start_token_id", "transformers_version", "use_cache",
    "cache_implementation", "_from_model_config", "_commit_hash", "do_sample", "trust_remote_code",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", *END_IDS,
}  # fmt: skip
# Values by which a field changes nothing.
_NEUTRAL = (None, False, [], {}, "", 0)
_NEUTRAL_OF = {
    "temperature": (1,), "top_p": (1,), "top_k": (0, 50), "repetition_penalty": (1,), "num_beams": (1,),
    "num_beam_groups": (1,), "length_penalty": (1,), "typical_p": (1,), "num_return_sequences": (1,),
    "encoder_repetition_penalty": (1,), "remove_invalid_values": (True,), "epsilon_cutoff": (0,),
}  # fmt: skip


def with_ends(config: ModelConfig, folder: Path) -> tuple[ModelConfig, list[str]]:
    """Adds the ends that the generation_config.json of a published folder names.

    Args:
      config: The config that config.json describes.
      folder: The folder, with or without a generation_config.json.

    Returns:
      The config with these ends in `end_ids`, and lines that say what in the file is not used.

    Raises:
      UserError: If the file is damaged or names MASK as an end.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return config, []
    fields = read_json(path)
    found, missing = [], []
    for name in END_IDS:
        for i in listed(fields.get(name)):
            if not is_id(i):
                raise UserError(f"{path}: {name} must be an id or a list of ids, not {short(fields[name])}")
            if i == config.mask_id:
                raise UserError(f"{path}: {name} names {i}, which is mask_token_id in config.json: remove it there")
            (found if i < (config.token_count or config.vocab_size) else missing).append(i)
    notes = []
    if missing:
        named = ", ".join(map(str, dict.fromkeys(missing)))
        notes.append(f"{path}: the model has no token {named}, which the file names as an end of a text")
    unused = sorted(name for name, value in fields.items() if name not in _HARMLESS and not _neutral(name, value))
    if unused:
        named = ", ".join(" ".join(name.split()) for name in unused)
        notes.append(f"{path}: not used: {named} (the sampler takes its settings from you)")
    ends = others((*config.end_ids, *found), (config.eos_id, config.eot_id))
    return dataclasses.replace(config, end_ids=ends), notes


def with_ends_of_source(config: ModelConfig, kept: Path) -> ModelConfig:
    """Returns a run's config with the ends that are named by the files which its published source left in `kept`."""
    if not (kept / CONFIG).is_file():
        return config
    fields = read_json(kept / CONFIG)
    named = [i for name in END_IDS for i in listed(fields.get(name)) if is_id(i) and i < config.vocab_size]
    ends = others((*config.end_ids, *named), (config.eos_id, config.eot_id))
    return with_ends(dataclasses.replace(config, end_ids=ends), kept)[0]


def _neutral(name: str, value: Any) -> bool:
    return value in _NEUTRAL or value in _NEUTRAL_OF.get(name, ())


def generation_config(config: ModelConfig, fields: Mapping[str, Any]) -> bytes:
    """Returns the content of a generation_config.json.

    Args:
      config: The model, whose ids are written.
      fields: The fields of the folder's config.json.
    """
    ids = {"bos_token_id": config.bos_id, "eos_token_id": fields.get("eos_token_id"), "pad_token_id": config.eos_id}
    known = {name: value for name, value in ids.items() if value is not None}
    versions = {name: fields[name] for name in ("transformers_version",) if name in fields}
    return as_json({"_from_model_config": True, **known, **versions})
