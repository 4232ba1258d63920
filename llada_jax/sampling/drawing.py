"""Completes prompts one after the other, and draws each in the terminal while its tokens appear."""

import sys

import jax
import numpy as np

from llada_jax.model.transformer import Transformer
from llada_jax.sampling import lengths, terminal, watching
from llada_jax.sampling.recording import ALTERNATIVES, Recorder
from llada_jax.sampling.sampler import denoise_steps
from llada_jax.sampling.text_completion import Options, encode_prompt, finished_text, make_batches, row_keys
from llada_jax.text.tokenizer import Tokenizer


def complete_drawn(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: list[str],
    options: Options,
    key: jax.Array,
    recorder: Recorder | None = None,
) -> list[str]:
    """Returns what `text_completion.complete` returns, and draws every reverse step on stderr.

    Args:
      model: The model.
      tokenizer: The tokenizer of the model.
      texts: The prompts.
      options: The settings of the sampler.
      key: The key of the noise.
      recorder: What records the steps as well.
    """
    prompts = [encode_prompt(text, model, tokenizer, options) for text in texts]
    mask_id = watching.open_id(model.config.mask_id)
    completions = {}
    for batch in make_batches(model, prompts, options, batch_size=1):
        (i,) = batch.rows
        prompt, start = prompts[i], int(np.sum(~batch.real_BT))
        with terminal.Screen(sys.stderr) as screen:
            given_T = np.zeros(0, bool)
            arguments = (model, batch.prompt_BT, batch.config, row_keys(key, batch.rows), batch.real_BT)
            if recorder is None:
                steps = denoise_steps(*arguments)
            else:
                steps = recorder.follow(denoise_steps(*arguments, alternatives=ALTERNATIVES), batch, prompts)
            for number, step in enumerate(steps):
                tokens_T = step.tokens_BT[0, start:]
                if not number:
                    given_T = tokens_T != mask_id
                    given_T[len(prompt.ids_T) :] = False
                end = lengths.shown(tokens_T, prompt.ids_T, batch.config, model.config)
                shown_T, own_T, new_T = tokens_T[:end], given_T[:end], step.new_BT[0, start : start + end]
                revealed, masks = int(np.sum((shown_T != mask_id) & ~own_T)), int(np.sum(~own_T))
                frame = terminal.spans(shown_T, own_T, new_T, mask_id, tokenizer, screen.mask)
                screen.draw(frame, f"step {number}, {revealed} of {masks} tokens")
            completions[i] = finished_text(tokens_T, prompt, model, tokenizer)
            if not prompt.masks:
                given = tokenizer.decode(prompt.ids_T.tolist(), skip_special=True)
                screen.finish([(given, "prompt"), (completions[i], "text")])
            else:
                screen.finish([(completions[i], "text")])
    return [completions[i] for i in range(len(prompts))]
