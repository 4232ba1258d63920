"""Measures what instruction tuning changes, on held-out conversations: the bound on answers, and generated answers.

    python benchmarks/tuning.py --model=runs/base --model=runs/tuned --set=data/gsm8k --answers=100 \
        --format='\\n#### -?[0-9][0-9,.]*$'

Prints one JSON line per model, checkpoint and set:

  nats_per_token, bits_per_byte   the bound (Eq. 14) on the held-out answers given their prompts; each answer includes
              its one EOS
  stops       share of the generated answers that end (with EOS or end of turn) within --gen_length tokens
  in_format   share of the generated answers that end and whose text matches --format
  in_format_reference   share of the held-out answers whose text matches --format
  correct     share of the generated answers whose text equals the held-out answer, apart from case and spaces; with
              --format, only the parts of both texts that match the pattern are compared
  words       median number of words of the generated answers
  words_reference   median number of words of the held-out answers

The prompts are rendered with each set's chat template, even for a model that has never seen this template.
"""

import json
import re
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from llada_jax.cli import entry_point, paths
from llada_jax.config import UserError, ValidationConfig
from llada_jax.data.manifest import load_manifest
from llada_jax.data.read.chat import held_out_answers
from llada_jax.data.rows import HeldOut
from llada_jax.devices import mesh
from llada_jax.formats import workdir
from llada_jax.loading import load
from llada_jax.model.transformer import Transformer, split
from llada_jax.sampling.sampler import generate
from llada_jax.sampling.text_completion import Options, make_batches, make_prompt, row_keys, text_length
from llada_jax.scoring import bound
from llada_jax.text.tokenizer import Tokenizer

_MODELS = paths.define_multi("model", None, "Training workdirs or published folders.", required=True)
_SETS = paths.define_multi("set", None, "Folders written by prepare --chat, with held-out rows.", required=True)
_CHECKPOINTS = flags.DEFINE_list("checkpoints", [], "Steps of the workdirs, or all. Default: each workdir's newest.")
_ROWS = flags.DEFINE_integer("rows", 256, "Number of held-out answers that the bound is computed for.")
_SAMPLES = flags.DEFINE_integer("samples", 8, "Number of Monte Carlo samples of the bound per answer.")
_ANSWERS = flags.DEFINE_integer("answers", 0, "Number of prompts that the model answers; 0 means none.")
_FORMAT = flags.DEFINE_string("format", None, "Regular expression that an answer in the asked format contains.")
_GEN_LENGTH = flags.DEFINE_integer("gen_length", 64, "Largest number of tokens of a generated answer.")
_STEPS = flags.DEFINE_integer("steps", None, "Number of reverse steps. Default: one per token.")
_BLOCK_LENGTH = flags.DEFINE_integer("block_length", 32, "Number of tokens per block.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 always takes the most probable token.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Number of rows that are processed at once.")


def held_out_bound(model: Transformer, rows: HeldOut) -> dict[str, float]:
    """Returns the bound of Eq. 14 on the answers in all rows."""
    with mesh.mesh_of(model.embedding[...]):
        values = bound.validate(
            *split(model), rows, ValidationConfig(samples=_SAMPLES.value), batch_size=_BATCH_SIZE.value, chunk=512,
            mask_id=model.config.mask_id,
        )  # fmt: skip
    return {name: round(values[name], 4) for name in ("nats_per_token", "bits_per_byte")}


def answers(model: Transformer, tokenizer: Tokenizer, rows: HeldOut) -> dict[str, float]:
    """Generates answers to the prompts in `rows` and compares them with the held-out answers.

    Returns:
      The values from the module docstring, and "examples": the first five prompts with both answers.
    """
    options = Options(
        steps=_STEPS.value,
        gen_length=_GEN_LENGTH.value,
        block_length=_BLOCK_LENGTH.value,
        temperature=_TEMPERATURE.value,
    )
    pairs = list(zip(*rows[:3], strict=True))
    prompts = [make_prompt(tokens_T[:given], model, tokenizer, options) for tokens_T, _, given in pairs]
    wanted = [decoded(tokens_T[given:length], tokenizer) for tokens_T, length, given in pairs]
    written: dict[int, tuple[str, bool]] = {}
    for batch in make_batches(model, prompts, options, _BATCH_SIZE.value):
        keys_B = row_keys(jax.random.key(0), batch.rows)
        tokens_BT = np.asarray(generate(model, batch.prompt_BT, batch.config, keys_B, batch.real_BT))
        for i, row_T in zip(batch.rows, tokens_BT[:, -_GEN_LENGTH.value :], strict=True):
            length = text_length(row_T, model, tokenizer)
            written[i] = decoded(row_T[:length], tokenizer), length < len(row_T)
    texts, ended = zip(*(written[i] for i in range(len(prompts))), strict=True)
    formed, references = [matched(text) for text in texts], [matched(text) for text in wanted]
    result = {
        "answers": len(texts),
        "stops": share(ended),
        "words": statistics.median(len(text.split()) for text in texts),
        "words_reference": statistics.median(len(text.split()) for text in wanted),
        "correct": share(a is not None and a == b for a, b in zip(formed, references, strict=True)),
    }
    if _FORMAT.value:
        result["in_format"] = share(end and text is not None for end, text in zip(ended, formed, strict=True))
        result["in_format_reference"] = share(text is not None for text in references)
    shown = [
        {"prompt": decoded(tokens_T[:given], tokenizer)[-200:], "answer": text, "reference": reference}
        for (tokens_T, _, given), text, reference in list(zip(pairs, texts, wanted, strict=True))[:5]
    ]
    return result | {"examples": shown}


def decoded(ids_T: np.ndarray, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids_T.tolist(), skip_special=True, continuation=True)


def matched(text: str) -> str | None:
    if _FORMAT.value is None:
        return " ".join(text.lower().split())
    found = re.search(_FORMAT.value, text.rstrip())
    return found and found[0].strip()


def share(values) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4)


def checkpoints_of(folder: str) -> list[int | None]:
    """Returns the checkpoints (steps) of a model to measure, or [None] for a published folder, which has none."""
    if not workdir.is_workdir(Path(folder), "--model="):
        return [None]
    wanted = _CHECKPOINTS.value
    if wanted == ["all"]:
        return workdir.saved_steps(folder)
    try:
        return [workdir.choose_step(folder, int(step)) for step in wanted] or [workdir.choose_step(folder, None)]
    except ValueError as error:
        raise UserError(f"--checkpoints={','.join(wanted)}: write steps separated by commas, or all") from error


def main() -> None:
    """Measures all models, checkpoints and sets, and prints one line for each."""
    for folder in _MODELS.value:
        for step in checkpoints_of(folder):
            model, tokenizer = load(folder, step=step)
            for path in _SETS.value:
                manifest = load_manifest(path)
                if tokenizer is None or tokenizer.sha256 != manifest.tokenizer_sha256:
                    raise UserError(
                        f"--set={path} was not prepared with the tokenizer of --model={folder}: prepare the set again "
                        "with this tokenizer"
                    )
                if not manifest.validation.rows:
                    raise UserError(
                        f"--set={path} has no held-out conversations: prepare it with a larger --validation_fraction"
                    )
                length = manifest.sequence_length
                started = time.monotonic()
                rows = held_out_answers([path], _ROWS.value, length, model.config.vocab_size)
                bound_of = held_out_bound(model, rows)
                record = {"model": folder, "step": step, "set": path, "rows": len(rows.tokens_NT), **bound_of}
                if _ANSWERS.value:
                    some = held_out_answers([path], _ANSWERS.value, length, model.config.vocab_size)
                    record |= answers(model, tokenizer, some)
                print(json.dumps(record | {"seconds": round(time.monotonic() - started, 1)}), flush=True)


if __name__ == "__main__":
    entry_point.run(main)
