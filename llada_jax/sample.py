"""Complete prompts or fill them in: python -m llada_jax.sample --model=DIR --prompt="..."

Prints the continuation, cut at EOS, to stdout; the whole text if the prompt has [MASK] in it. All else
goes to stderr. With --prompts=FILE.jsonl (lines {"prompt": "..."}) and --output=FILE many at once.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.formats.folders import write_text
from llada_jax.loading import load
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import terminal
from llada_jax.sampling.sampler import check_settings, denoise_steps
from llada_jax.sampling.text_completion import (
    DEFAULTS,
    Options,
    complete,
    encode_prompt,
    finished_text,
    make_batches,
    row_keys,
)
from llada_jax.text.tokenizer import Tokenizer

_MODEL = flags.DEFINE_string("model", None, "A training workdir, or a folder with a published model.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the workdir; default: its newest.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue, or to fill in at [MASK]; may be repeated.")
_PROMPTS = flags.DEFINE_string("prompts", None, 'JSONL file, one {"prompt": "..."} per line.')
_OUTPUT = flags.DEFINE_string("output", None, 'JSONL file written instead of stdout: lines with "completion" added.')
_STEPS = flags.DEFINE_integer("steps", None, "Reverse steps; default: one for each token.")
_GEN_LENGTH = flags.DEFINE_integer("gen_length", None, "Tokens to append; default: 64, or 0 when filling in.")
_BLOCK_LENGTH = flags.DEFINE_integer("block_length", DEFAULTS.block_length, "Tokens per block, left to right.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 = always the most probable token.")
_REMASKING = flags.DEFINE_string("remasking", "low_confidence", "Which predictions stay: low_confidence or random.")
_CFG_SCALE = flags.DEFINE_float("cfg_scale", 0.0, "Guidance towards the prompt; doubles the time. 0 = none.")
_LOGITS_EOS_INF = flags.DEFINE_boolean("logits_eos_inf", False, "Never choose EOS: all of gen_length becomes text.")
_CONFIDENCE_EOS_EOT_INF = flags.DEFINE_boolean(
    "confidence_eos_eot_inf", False, "EOS and end of turn stay only where nothing else can."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0, upper_bound=2**32 - 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Prompts at once; changes no completion.")
_SHOW = flags.DEFINE_boolean("show", False, "Show in the terminal how the text appears.")


def main() -> None:
    """Does what the flags say; all of a user's mistakes that can be seen without the model come first."""
    options = Options(
        steps=_STEPS.value,
        gen_length=_GEN_LENGTH.value,
        block_length=_BLOCK_LENGTH.value,
        temperature=_TEMPERATURE.value,
        remasking=_REMASKING.value,
        cfg_scale=_CFG_SCALE.value,
        logits_eos_inf=_LOGITS_EOS_INF.value,
        confidence_eos_eot_inf=_CONFIDENCE_EOS_EOT_INF.value,
    )
    check_settings(options.sampler(0, DEFAULTS.gen_length if options.gen_length is None else options.gen_length))
    if _BATCH_SIZE.value < 1:
        raise UserError(f"--batch_size={_BATCH_SIZE.value}: it must be at least 1")
    records = [{"prompt": text} for text in _PROMPT.value]
    if _PROMPTS.value is not None:
        records += read_records(Path(_PROMPTS.value))
    if not records:
        raise UserError('nothing to complete: give --prompt="..." or --prompts=FILE.jsonl')
    output = None if _OUTPUT.value is None else Path(_OUTPUT.value)
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.absolute().parent}")
    if not _MODEL.value:
        raise UserError("--model=DIR is missing: a training workdir, or a folder with a published model")

    model, tokenizer = load(_MODEL.value, step=_STEP.value)
    if tokenizer is None:
        raise UserError(f"{_MODEL.value} has no tokenizer: put its tokenizer.json or tokenizer.model there")
    texts, key = [record["prompt"] for record in records], jax.random.key(_SEED.value)
    shown = _SHOW.value and terminal.can_draw(sys.stderr)
    if shown:
        completions = show(model, tokenizer, texts, options, key)
    else:
        started = time.monotonic()
        completions = complete(model, tokenizer, texts, options, key, _BATCH_SIZE.value, _report(len(texts)))
        print(f"{len(texts)} completed in {time.monotonic() - started:.1f} s", file=sys.stderr)

    if output is not None:
        pairs = zip(records, completions, strict=True)
        write_records(output, [record | {"completion": text} for record, text in pairs])
    elif not (shown and sys.stdout.isatty()):  # there it stands already
        for text in completions:
            print(text)


def _report(total: int):
    def report(done: int) -> None:
        if total > _BATCH_SIZE.value:
            print(f"{done} of {total}", file=sys.stderr)

    return report


def show(model: Transformer, tokenizer: Tokenizer, texts: list[str], options: Options, key: jax.Array) -> list[str]:
    """`complete`, one prompt after the other, each drawn on stderr while its tokens appear."""
    prompts = [encode_prompt(text, model, tokenizer, options) for text in texts]
    mask_id = model.config.mask_id
    completions = {}
    for batch in make_batches(model, prompts, options, batch_size=1):
        (i,) = batch.rows
        prompt, start = prompts[i], int(np.sum(~batch.real_BT))
        with terminal.Screen(sys.stderr) as screen:
            given_T = np.zeros(0, bool)
            steps = denoise_steps(model, batch.prompt_BT, batch.config, row_keys(key, batch.rows), batch.real_BT)
            for step, (tokens_BT, new_BT) in enumerate(steps):
                tokens_T = tokens_BT[0, start:]
                if not step:
                    given_T = tokens_T != mask_id
                revealed, masks = int(np.sum((tokens_T != mask_id) & ~given_T)), int(np.sum(~given_T))
                frame = terminal.spans(tokens_T, given_T, new_BT[0, start:], mask_id, tokenizer, screen.mask)
                screen.draw(frame, f"step {step}, {revealed} of {masks} tokens")
            completions[i] = finished_text(tokens_T, prompt, model, tokenizer)
            if not prompt.masks:
                given = tokenizer.decode(prompt.ids_T.tolist(), skip_special=True)
                screen.finish([(given, "prompt"), (completions[i], "text")])
            else:
                screen.finish([(completions[i], "text")])
    return [completions[i] for i in range(len(prompts))]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, each with a "prompt". UserError names the line that has none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path}: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{path}:{number} must be an object with a text "prompt"')
        records.append(record)
    return records


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes a JSONL file whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


if __name__ == "__main__":
    entry_point.run(main)
