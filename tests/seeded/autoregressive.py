"""Faults in autoregressive models: in the mask, the loss, the cache, and the ends of texts."""

from seeded.fault import Fault

_SAMPLER = "sampling/test_causal.py::"
_LOSS = "diffusion/test_next_token.py::"

FAULTS = (
    Fault(
        "token-sees-the-next-one",
        "llada_jax/model/cpu.py",
        old="jnp.arange(keys) <= position_Q[:, None], 0.0",
        new="jnp.arange(keys) <= position_Q[:, None] + 1, 0.0",
        harm="On CPUs each token sees the one that it should predict: the loss falls to 0, and texts become nonsense.",
        tests=("model/test_causal.py::test_kernels_equal_the_definition[cpu-13-8-all]",),
    ),
    Fault(
        "next-token-is-the-token-itself",
        "llada_jax/diffusion/forward.py",
        old="jnp.roll(tokens_BT, -1, axis=1),\n    )",
        new="tokens_BT,\n    )",
        harm="An autoregressive model learns to repeat the token that it sees, with a loss that soon is 0.",
        tests=(_LOSS + "test_text_predicts_each_token_but_the_first",),
    ),
    Fault(
        "answers-are-taught-without-their-end",
        "llada_jax/diffusion/forward.py",
        old="axis=1).astype(jnp.int32) + 2",
        new="axis=1).astype(jnp.int32) + 1",
        harm="An autoregressive model that was tuned on short answers never ends them, because no EOS has a loss.",
        tests=(_LOSS + "test_conversations_predict_the_answer_and_one_eos",),
    ),
    Fault(
        "new-token-one-slot-too-far",
        "llada_jax/sampling/causal.py",
        old="fed_B1, slot_B = _newest(state), state.length_B + state.done - 1",
        new="fed_B1, slot_B = _newest(state), state.length_B + state.done",
        harm="An autoregressive model writes each token a position too far, behind a slot of the cache that is empty.",
        tests=(_SAMPLER + "test_greedy_is_that_of_transformers[llama]",),
    ),
    Fault(
        "ended-rows-write-on",
        "llada_jax/sampling/causal.py",
        old="token_B = jnp.where(ended_B, config.eos_id, token_B)",
        new="token_B = jnp.where(ended_B & False, config.eos_id, token_B)",
        harm="In a batch, a text that has ended goes on with what follows its end, as long as another one is written.",
        tests=(_SAMPLER + "test_rows_stop_at_their_ends",),
    ),
)
