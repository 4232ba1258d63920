"""Tests the objectives of autoregressive models against sums over single positions."""

import jax.numpy as jnp
import numpy as np

from llada_jax.config import DiffusionConfig
from llada_jax.diffusion import forward

EOS = 2


def losses(noisy, nll_of):
    """Returns the loss of each row, where nll_of(row, position, id) is the nll of an id as the next token there."""
    tokens_BT, counts_BT, weight_BT, _, targets_BT = map(np.asarray, noisy)
    assert ((weight_BT > 0) == counts_BT).all() and tokens_BT.shape == targets_BT.shape
    return [
        sum(w * nll_of(b, t, targets_BT[b, t]) for t, w in enumerate(row_T) if w > 0)
        for b, row_T in enumerate(weight_BT)
    ]


def test_text_predicts_each_token_but_the_first(rng):
    tokens_BT = rng.integers(3, 90, (3, 8)).astype(np.int32)
    lengths = [8, 5, 1]
    table_BTV = rng.uniform(size=(3, 8, 90))
    batch = {"tokens": jnp.asarray(tokens_BT), "length": jnp.asarray(lengths, jnp.int32)}
    noisy = forward.next_token(None, batch, None, DiffusionConfig(), None)
    np.testing.assert_array_equal(noisy.tokens_BT, tokens_BT)
    wanted = [
        np.mean([table_BTV[b, t - 1, tokens_BT[b, t]] for t in range(1, n)]) if n > 1 else 0.0
        for b, n in enumerate(lengths)
    ]
    np.testing.assert_allclose(losses(noisy, lambda b, t, i: table_BTV[b, t, i]), wanted, rtol=1e-6)
    assert np.asarray(noisy.p_mask_B).tolist() == [1.0] * 3


def test_conversations_predict_the_answer_and_one_eos(rng):
    """The rows are as `ChatData` makes them: all have the length of the longest; EOS fills the shorter ones."""
    rows = [([5, 6, EOS, 7], [8, 9, EOS]), ([5], [6, EOS]), ([4, 4], [EOS]), ([3, 7, 7], [9, 9, EOS])]
    longest, width = 7, 10
    tokens_BT = np.full((4, width), EOS, np.int32)
    for row_T, (prompt, answer) in zip(tokens_BT, rows, strict=True):
        row_T[: len(prompt) + len(answer)] = prompt + answer
    table_BTV = rng.uniform(size=(4, width, 10))
    batch = {
        "tokens": jnp.asarray(tokens_BT),
        "length": jnp.full(4, longest, jnp.int32),
        "prompt": jnp.asarray([len(prompt) for prompt, _ in rows], jnp.int32),
    }
    noisy = forward.next_token_sft(None, batch, None, DiffusionConfig(), None)
    wanted = [
        np.mean([table_BTV[b, len(prompt) + i - 1, token] for i, token in enumerate(answer)])
        for b, (prompt, answer) in enumerate(rows)
    ]
    np.testing.assert_allclose(losses(noisy, lambda b, t, i: table_BTV[b, t, i]), wanted, rtol=1e-6)


def test_all_positions_count_for_the_plan():
    assert forward.masked_share(DiffusionConfig(objective="next_token")) == 1.0
    assert forward.masked_share(DiffusionConfig()) == 0.5
