"""Makes a model's config and its tokenizer agree on the vocabulary and the special ids, and hashes chat templates.

The config and the tokenizer may each leave something open that the other one knows.
"""

import dataclasses
import hashlib
from pathlib import Path

from llada_jax.config import ModelConfig, UserError
from llada_jax.text.tokenizer import Tokenizer


def resolve_ids(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Fills in, in place, the settings that the config of a new model leaves to the tokenizer of its data.

    Args:
      model: The config. Its vocab_size, token_count and special ids are set where they are still open.
      tokenizer: The tokenizer that the data was prepared with.

    Raises:
      UserError: If the config and the tokenizer contradict each other, or if the vocabulary is too small.
    """
    model.vocab_size = model.vocab_size or tokenizer.vocab_size
    if tokenizer.size > model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={model.vocab_size} is smaller than the tokenizer's {tokenizer.size} tokens: "
            "set it to 0 to take the size of the tokenizer"
        )
    wanted = {"token_count": tokenizer.size}
    wanted.update((name, getattr(tokenizer, name)) for name in ("mask_id", "bos_id", "eos_id", "eot_id"))
    for name, value in wanted.items():
        if getattr(model, name) is None:
            setattr(model, name, value)
        elif getattr(model, name) != value:
            raise UserError(
                f"config.model.{name}={getattr(model, name)}, but the tokenizer has {value}: take the tokenizer that "
                "belongs to the config, or delete the setting from the config file"
            )


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
    return tokenizer.of_model(config.mask_id, config.bos_id, config.eos_id)


def with_tokenizer(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """Returns the config of an existing model, in which its (fitted) tokenizer fills in the settings left open.

    These settings are the number of tokens and the special ids. An id beyond the vocabulary is not a token of the
    model, so the setting stays open.
    """
    if tokenizer is None:
        return config
    missing = {"token_count": min(tokenizer.size, config.vocab_size)}
    for name in ("mask_id", "bos_id", "eos_id", "eot_id"):
        if (found := getattr(tokenizer, name)) < config.vocab_size:
            missing[name] = found
    return dataclasses.replace(
        config, **{name: value for name, value in missing.items() if getattr(config, name) is None}
    )


def template_hash(tokenizer: Tokenizer) -> str:
    """Returns the sha256 of the chat template that renders the conversations."""
    return hashlib.sha256((tokenizer.chat_template or tokenizer.default_chat_template).encode()).hexdigest()
