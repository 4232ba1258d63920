"""Faults in what a model answers: in the sampler, the scores, conversations, evaluations, and loading."""

from seeded.fault import Fault

_SAMPLER = "sampling/test_sampler.py::"

FAULTS = (
    # sampling
    Fault(
        "mask-as-an-answer",
        "llada_jax/sampling/remasking.py",
        old="allowed_V = (vocabulary != mask_id) & (vocabulary <",
        new="allowed_V = (vocabulary >= 0) & (vocabulary <",
        harm="The sampler may choose MASK as a token, and MASK stays in the finished text.",
        tests=(_SAMPLER + "test_never_a_token_that_is_none",),
    ),
    Fault(
        "one-step-too-many",
        "llada_jax/sampling/remasking.py",
        old="return jnp.maximum(share_B + (block_B < extra_B), 1)",
        new="return jnp.maximum(share_B + (block_B <= extra_B), 1)",
        harm="One block plans a step that it never takes, so a MASK can stay in the finished text.",
        tests=("sampling/test_remasking.py::test_schedule_is_the_plain_one",),
    ),
    Fault(
        "guidance-sees-the-padding",
        "llada_jax/sampling/guidance.py",
        old="h_2BTD = jax.lax.map(lambda canvas_BT: model.trunk(canvas_BT, real), canvas_2BT)",
        new="h_2BTD = jnp.stack([model.trunk(canvas_2BT[0], real), model.trunk(canvas_2BT[1])])",
        harm="With guidance, a completion changes with the padding, which depends on the other prompts of its batch.",
        tests=(
            _SAMPLER + "test_generate_is_the_plain_sampler[guided]",
            "sampling/test_guidance.py::test_logits_of_guided_hidden_states_are_equation_16",
        ),
    ),
    Fault(
        "end-before-its-block-is-finished",
        "llada_jax/sampling/plan.py",
        old="(slot_T < (block_B * config.block_length)[:, None])",
        new="(slot_T < ((block_B + 1) * config.block_length)[:, None])",
        harm="An answer ends as soon as EOS appears, although tokens in front of it are still masked.",
        tests=(_SAMPLER + "test_generate_is_the_plain_sampler[stop-after-the-block]",),
    ),
    Fault(
        "noise-repeats-in-every-block",
        "llada_jax/sampling/step.py",
        old="jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.fold_in)(rows.key_B, plan.block_B), plan.inner_B)",
        new="jax.vmap(jax.random.fold_in)(rows.key_B, plan.inner_B)",
        harm="Every block of a sampled text draws with the same noise, so the blocks are not independent draws.",
        tests=(_SAMPLER + "test_generate_is_the_plain_sampler[sampled]",),
    ),
    Fault(
        "left-padding-is-not-rotated",
        "llada_jax/sampling/canvas.py",
        old="aligned_BT, real_BT = (np.take_along_axis(x, at_BT, axis=1) for x in (tokens_BT, real_BT))",
        new="aligned_BT = np.take_along_axis(tokens_BT, at_BT, axis=1)",
        harm="Left-padded prompts attend to their padding and not to the end of their own canvas.",
        tests=(
            _SAMPLER + "test_a_row_is_the_same_alone_as_in_a_batch",
            _SAMPLER + "test_tokens_are_those_of_the_published_code[gqa-0]",
        ),
    ),
    Fault(
        "sure-rules-commit-the-one-that-fails",
        "llada_jax/sampling/commit.py",
        old="return (n_K + 1) * (1 - ranked.score_BK) < bound",
        new="return n_K * (1 - ranked.score_BK) < bound",
        harm="With commit=factor, a step keeps one token more than the bound allows.",
        tests=(
            "sampling/test_commit.py::test_rules_are_their_formulas",
            "sampling/test_commit.py::test_generate_is_the_plain_sampler[factor-plain]",
        ),
    ),
    Fault(
        "largest-entropy-of-the-batch",
        "llada_jax/sampling/commit.py",
        old="highest_BK = jax.lax.cummax(ranked.entropy_BK, axis=1)",
        new="highest_BK = jax.lax.cummax(ranked.entropy_BK, axis=0)",
        harm="With commit=entropy, what a row keeps depends on the other rows of its batch.",
        tests=(
            "sampling/test_commit.py::test_rules_are_their_formulas",
            "sampling/test_commit.py::test_generate_is_the_plain_sampler[entropy-plain]",
        ),
    ),
    Fault(
        "block-sees-its-old-keys",
        "llada_jax/model/kv_cache.py",
        old="write(old[:, :slots], slot_BN, x) for old, x in zip(kept, new, strict=True)",
        new="old[:, :slots] for old in kept",
        harm="With a cache, no step sees the tokens that the earlier steps of its block have filled in.",
        tests=(
            "model/test_kv_cache.py::test_fewer_queries_than_keys[cpu]",
            "sampling/test_cache.py::test_generate_is_the_plain_sampler_with_stale_keys[dual]",
        ),
    ),
    Fault(
        "full-passes-of-other-rows",
        "llada_jax/sampling/cache.py",
        old="is_full = ~jnp.any(ready_B)",
        new="is_full = jnp.any(going_B & ~ready_B)",
        harm="With a cache, a row gets fresh keys whenever another row needs them, so its text depends on its batch.",
        tests=("sampling/test_cache.py::test_generate_is_the_plain_sampler_with_stale_keys[dual-threshold]",),
    ),
    Fault(
        "end-of-turn-is-no-end",
        "llada_jax/sampling/text_completion.py",
        old="for i in (known.eos_id, known.eot_id, *known.end_ids)}",
        new="for i in (known.eos_id, *known.end_ids)}",
        harm="An answer is not cut at the end of its turn, so what the model writes after it is shown too.",
        tests=("entry_points/test_sample.py::test_text_ends_at_eos_and_infilling_keeps_the_rest",),
    ),
    # scoring
    Fault(
        "likelihood-without-its-weight",
        "llada_jax/scoring/likelihood.py",
        old='return moved(mask_BT, batch["prompt"]), answer_B / masked_B',
        new='return moved(mask_BT, batch["prompt"]), masked_B / masked_B',
        harm="The estimator lacks the factor L / l, so long answers score too well and benchmarks are wrong.",
        tests=("scoring/test_likelihood.py::test_few_masks_are_enumerated[prompt0-answer0-0.0]",),
    ),
    Fault(
        "greedy-test-ignores-the-last-token",
        "llada_jax/scoring/greedy.py",
        old="row_T[len(checked[i].prompt_T) : checked[i].length] = open_R[i]",
        new="row_T[len(checked[i].prompt_T) : checked[i].length - 1] = open_R[i][:-1]",
        harm="An answer whose last token is wrong counts as the greedy one, so accuracies are too high.",
        tests=("scoring/test_greedy.py::test_guided_generation",),
    ),
    Fault(
        "validation-counts-filled-up-rows",
        "llada_jax/scoring/bound.py",
        old="total += float(np.asarray(nats_B, np.float64)[: count - first].sum())",
        new="total += float(np.asarray(nats_B, np.float64).sum())",
        harm="The copies that fill up the last batch count as text, so the validation loss is too high.",
        tests=("scoring/test_bound.py::test_validation_is_the_mean_of_its_bounds",),
    ),
    # conversation
    Fault(
        "undo-removes-one-message",
        "llada_jax/conversation/conversation.py",
        old="self.replace(self._asked()[:-1])",
        new="self.replace(self.messages[:-1])",
        harm="/undo removes only the answer, so the message that was taken back is answered again.",
        tests=("conversation/test_conversation.py::test_editing_taking_back_and_starting_anew",),
    ),
    Fault(
        "again-gives-the-same-answer",
        "llada_jax/conversation/conversation.py",
        old="        self._attempts += 1\n",
        new="",
        harm="/again computes exactly the answer that the user did not want.",
        tests=("conversation/test_conversation.py::test_answers_are_those_of_the_sampler_on_the_whole_chat",),
    ),
    # evaluation
    Fault(
        "models-share-cached-results",
        "llada_jax/evaluation/results.py",
        old='"weights": digest(weights)}',
        new='"weights": digest(b"")}',
        harm="A retrained model at the same path gets the cached results of its predecessor.",
        tests=("entry_points/test_evaluate.py::test_another_model_at_the_same_place[published]",),
    ),
    Fault(
        "settings-share-cached-results",
        "llada_jax/evaluation/run.py",
        old="content = json.dumps([identity, job.settings(), __version__, pairs.RULE], sort_keys=True)",
        new="content = json.dumps([identity, __version__, pairs.RULE], sort_keys=True)",
        harm="An evaluation with other settings, such as guidance, reports the cached figures of the one before.",
        tests=("entry_points/test_evaluate.py::test_what_tells_models_apart",),
    ),
    Fault(
        "long-prompts-lose-their-end",
        "llada_jax/evaluation/harness.py",
        old="prompts.append(prompt if room is None else self._cut(prompt, room))",
        new="prompts.append(prompt if room is None else prompt[:room])",
        harm="A prompt that is too long loses the question and keeps the examples, so scores drop without an error.",
        tests=("evaluation/test_harness.py::test_what_is_too_long_loses_its_beginning",),
    ),
    Fault(
        "last-stop-string-wins",
        "llada_jax/evaluation/harness.py",
        old="return text[: min((at for stop in stops",
        new="return text[: max((at for stop in stops",
        harm="A completion runs on past its first stop string into text that the task did not ask for.",
        tests=("evaluation/test_harness.py::test_settings_of_generation",),
    ),
    # loading
    Fault(
        "tokenizer-without-the-models-ids",
        "llada_jax/loading.py",
        old="tokenizer = fitted(find_tokenizer(path), found.config, path)",
        new="tokenizer = find_tokenizer(path)",
        harm="[MASK] in a prompt becomes a token that a published model does not know as MASK.",
        tests=("test_loading.py::test_the_tokenizer_knows_the_models_own_ids",),
    ),
    Fault(
        "step-is-ignored",
        "llada_jax/loading.py",
        old="model = weights.load_model(path, step, jax.sharding.get_mesh(), dtype)",
        new="model = weights.load_model(path, None, jax.sharding.get_mesh(), dtype)",
        harm="--step=N loads the newest checkpoint, so a comparison of checkpoints compares one with itself.",
        tests=("test_loading.py::test_a_training_workdir",),
    ),
)
