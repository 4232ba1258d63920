"""Makes a model's config and its tokenizer agree on the vocabulary and the special ids, and hashes chat templates.

The config and the tokenizer may each leave something open that the other one knows.
"""

import dataclasses
import hashlib
from pathlib import Path

from llada_jax.config import ModelConfig, UserError
from llada_jax.text.named_ids import others
from llada_jax.text.tokenizer import Tokenizer


def resolve_ids(model: ModelConfig, tokenizer: Tokenizer, chat: bool = False, source: str = "") -> None:
    """Fills in, in place, the settings that the config of a run leaves to the tokenizer of its data.

    The model needs a row for every id that the data may contain, and for MASK unless it is causal. Text contains EOS
    and the tokenizer's own tokens; only conversations contain the tokens of the chat template.

    Args:
      model: The config. Its vocab_size, token_count, special ids, ends and holes are set where they are still open.
      tokenizer: The tokenizer that the data was prepared with.
      chat: Whether the data are conversations.
      source: The folder that the config comes from, if it is that of an existing model.

    Raises:
      UserError: If the config and the tokenizer contradict each other, or if the vocabulary is too small.
    """
    model.vocab_size = model.vocab_size or tokenizer.vocab_size
    for name in ("mask_id", "bos_id", "eos_id", "eot_id"):
        _resolve(model, tokenizer, name, chat, source)
    appended = {tokenizer.eos_id, *tokenizer.prefix, *(_chat_ids(tokenizer) if chat else ())}
    if model.mask_id in appended:
        raise UserError(
            f"MASK is {model.mask_id} in {source or 'the config'} (config.model.mask_id), but the data was prepared "
            "with this id for another token: prepare it again with the ids of the model "
            f"(--tokenizer={source or 'FOLDER'})"
        )
    used = 1 + max(tokenizer.own_size - 1, *appended)
    if (needed := max(used, 0 if model.causal else model.mask_id + 1)) > model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={model.vocab_size} is smaller than the tokenizer's {needed} tokens that "
            f"{'conversations' if chat else 'text'} and MASK need: set it to 0 to take the size of the tokenizer"
        )
    if model.token_count is None:
        model.token_count = min(tokenizer.size, model.vocab_size)
    elif model.token_count < used:
        raise UserError(
            f"config.model.token_count={model.token_count}, but the tokenizer has {used}: take the tokenizer that "
            "belongs to the config, or delete the setting from the config file"
        )
    _take_ends_and_holes(model, tokenizer)


def _resolve(model: ModelConfig, tokenizer: Tokenizer, name: str, chat: bool, source: str) -> None:
    """Sets one of the ids, or checks that the config's id suits the tokenizer of the data."""
    ours, theirs = getattr(model, name), getattr(tokenizer, name)
    if ours is None:
        # Text needs no row for the tokens of the chat template and for BOS.
        known = name == "mask_id" or theirs != model.mask_id  # the model's MASK may have the id of a token of no text
        needed = name == "eos_id" or (name == "mask_id" and not model.causal)
        if known and theirs is not None and (theirs < model.vocab_size or needed):
            setattr(model, name, theirs)
        return
    if ours == theirs:
        return
    # The data does not contain MASK. Text contains neither BOS nor the end of a turn, if the tokenizer's files have no
    # token for them. Then the model's id holds, as in sampling.
    unused = name == "mask_id" or (name in ("bos_id", "eot_id") and not chat)
    if unused and theirs is not None and theirs >= tokenizer.own_size and not tokenizer.is_text(ours):
        return
    # Both ids end a text.
    if name == "eos_id" and (theirs in model.end_ids or ours in (tokenizer.eot_id, *tokenizer.end_ids)):
        return
    if source:
        role = name.removesuffix("_id")
        raise UserError(
            f"{role.upper()} is {ours} in {source} (config.model.{name}), but the data was prepared with {theirs}: "
            f"prepare it again with the ids of the model (--tokenizer={source}), or correct {role}_token_id in its "
            f"config.json or {role}_token in its tokenizer_config.json"
        )
    raise UserError(
        f"config.model.{name}={ours}, but the tokenizer has {theirs}: take the tokenizer that belongs to the config, "
        "or delete the setting from the config file"
    )


def _chat_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of a short conversation, with all tokens that the chat template writes around messages."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        return [*tokenizer.encode_chat(messages[:1]), *tokenizer.encode_chat(messages, add_generation_prompt=False)]
    except UserError:  # a template that wants other messages; its tokens are in the tokenizer's own files
        return []


def fitted(tokenizer: Tokenizer | None, config: ModelConfig, source: str | Path) -> Tokenizer | None:
    """Returns the tokenizer of an existing model with the MASK, BOS and EOS ids that the model's config states.

    Args:
      tokenizer: The tokenizer as its files describe it. None means that there is none.
      config: The config of the model.
      source: The folder that both come from, for error messages.

    Raises:
      UserError: If the tokenizer has tokens that the model has no embedding for.
    """
    if tokenizer is None:
        return None
    if tokenizer.own_size > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.own_size} tokens, the model's embedding {config.vocab_size}: "
            "put the tokenizer of this model into the folder"
        )
    eos_id = config.eos_id
    if eos_id is None and tokenizer.eos_id >= tokenizer.own_size:  # no file of the tokenizer has an EOS
        eos_id = next(iter(config.end_ids), None)
    return tokenizer.of_model(config.mask_id, config.bos_id, eos_id, config.end_ids)


def with_tokenizer(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """Returns the config of an existing model, in which its (fitted) tokenizer fills in the settings left open.

    These settings are the number of tokens, the special ids, the ids that end a text, and the ids that are no tokens.
    An id beyond the vocabulary is not a token of the model, so the setting stays open.
    """
    config = dataclasses.replace(config)
    if tokenizer is None:
        if config.eos_id is None and config.end_ids:
            config.eos_id, *further = config.end_ids
            config.end_ids = tuple(further)
        return config
    missing = {"token_count": min(max(tokenizer.size, 1 + max(config.end_ids, default=0)), config.vocab_size)}
    for name in ("mask_id", "bos_id", "eos_id", "eot_id"):
        if (found := getattr(tokenizer, name)) < config.vocab_size:
            missing[name] = found
    for name, value in missing.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    _take_ends_and_holes(config, tokenizer)
    return config


def _take_ends_and_holes(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Adds the ends that the tokenizer's files name, and the ids that are no tokens, to a config, in place."""
    size = config.token_count or config.vocab_size
    known = (config.eos_id, config.eot_id, config.mask_id)
    ends = others((*config.end_ids, tokenizer.eos_id, *tokenizer.end_ids), known)
    config.end_ids = tuple(i for i in ends if i < size)
    if not config.holes:
        config.holes = tokenizer.holes(size, {*known, *config.end_ids})


def notes_of(tokenizer: Tokenizer | None, source: str | Path) -> list[str]:
    """Returns the notes of a tokenizer as lines for the user, which begin with the folder that it comes from."""
    return [f"{source}: {note}" for note in tokenizer.notes] if tokenizer else []


def template_hash(tokenizer: Tokenizer) -> str:
    """Returns the sha256 of the chat template that renders the conversations."""
    return hashlib.sha256((tokenizer.chat_template or tokenizer.default_chat_template).encode()).hexdigest()
