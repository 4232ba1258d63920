"""Faults in how a model learns: in the noise, the loss, the model, the devices, and the run."""

from seeded.fault import Fault

_FORWARD = "diffusion/test_forward.py::"
_STEP = "training/test_step.py::"

FAULTS = (
    # diffusion
    Fault(
        "loss-by-padded-length",
        "llada_jax/diffusion/forward.py",
        old="mask_BT.sum(axis=1), length_B - first_B)",
        new="mask_BT.sum(axis=1), length - first_B)",
        harm="The loss of a short row is divided by the padded length, so short texts count for too little.",
        tests=(_FORWARD + "test_mask_rate_and_weight_of_each_row",),
    ),
    Fault(
        "weight-without-p-mask",
        "llada_jax/diffusion/forward.py",
        old="return 1 / (p_mask_B * length_B)",
        new="return jnp.ones_like(p_mask_B) / length_B",
        harm="The loss lacks the factor 1 / p_mask, so it is no longer a bound on the likelihood.",
        tests=(_FORWARD + "test_mask_rate_and_weight_of_each_row",),
    ),
    Fault(
        "t-once-per-batch",
        "llada_jax/diffusion/forward.py",
        old="jax.random.bits(jax.random.fold_in(k, 0), (), jnp.uint32))(row_keys(key, row_B))",
        new="jax.random.bits(jax.random.fold_in(k, 0), (), jnp.uint32))(row_keys(key, row_B * 0))",
        harm="All rows of a batch have the same mask ratio, so the gradients are far noisier than in the paper.",
        tests=(_FORWARD + "test_independent_rows_are_independent",),
    ),
    Fault(
        "first-token-is-never-masked",
        "llada_jax/diffusion/forward.py",
        old="free_BT = (position_T >= first_B[:, None])",
        new="free_BT = (position_T > first_B[:, None])",
        harm="The first token of a text, or of an answer, is never masked, so the model never learns to begin one.",
        tests=(
            _FORWARD + "test_every_masking_has_its_probability",
            _FORWARD + "test_objectives_beside_the_prompt",
        ),
    ),
    Fault(
        "head-gradient-without-its-scale",
        "llada_jax/diffusion/cross_entropy.py",
        old="return (dh_BTD * scale.astype(dh_BTD.dtype), dhead_DV * scale, None, None)",
        new="return (dh_BTD * scale.astype(dh_BTD.dtype), dhead_DV, None, None)",
        harm="The gradient of the head is not divided by the batch size, so clipping shrinks all other gradients.",
        tests=(
            "diffusion/test_cross_entropy.py::test_gradient_scales_with_cotangent",
            _STEP + "test_equals_a_plain_step",
        ),
    ),
    Fault(
        "loss-from-rounded-logits",
        "llada_jax/diffusion/cross_entropy.py",
        old='jnp.einsum("cd,dv->cv", h_CD, head_DV, preferred_element_type=jnp.float32)',
        new='jnp.einsum("cd,dv->cv", h_CD, head_DV).astype(jnp.float32)',
        harm="On accelerators the logits are rounded to bfloat16 before the softmax, and all losses with them.",
        tests=("diffusion/test_cross_entropy.py::test_logits_are_fp32_for_bfloat16_inputs",),
    ),
    # model
    Fault(
        "causal-mask-in-one-kernel",
        "llada_jax/model/attention.py",
        old="(splash.CausalMask if causal else splash.FullMask)",
        new="splash.CausalMask",
        harm="On TPUs, and only there, no token sees what comes after it, so the model cannot fill in text.",
        tests=("model/test_attention.py::test_kernels_equal_the_reference[splash_interpreted-128-2-2-128-all]",),
    ),
    Fault(
        "padding-mask-of-another-row",
        "llada_jax/model/cpu.py",
        old="jnp.repeat(bias_BS, self.heads, axis=0)",
        new="jnp.tile(bias_BS, (self.heads, 1))",
        harm="On CPUs the rows of a batch use each other's padding, so completions depend on their neighbours.",
        tests=(
            "model/test_cpu.py::test_attention_equals_reference",
            "model/test_cpu.py::test_cuts_do_not_change_attention",
        ),
    ),
    Fault(
        "query-heads-of-the-turn-before",
        "llada_jax/model/cpu.py",
        old="turn % self.turns_per_row * sizes[2], 0",
        new="turn % self.turns_per_row * self.heads, 0",
        harm="On CPUs, where query heads share keys, long rows are written with the queries of other heads.",
        tests=("model/test_cpu.py::test_cuts_do_not_change_attention",),
    ),
    Fault(
        "key-value-heads-interleaved",
        "llada_jax/model/attention.py",
        old="q_BTGRK = q_BTHK.reshape(batch, length, groups, heads // groups, width)",
        new="q_BTGRK = q_BTHK.reshape(batch, length, heads // groups, groups, width).swapaxes(2, 3)",
        harm="Query heads read the keys of other groups, so published models with grouped queries write nonsense.",
        tests=("model/test_attention.py::test_reference_is_the_definition",),
    ),
    Fault(
        "rope-of-neighbouring-components",
        "llada_jax/model/rope.py",
        old="jnp.roll(x_BTHK, x_BTHK.shape[-1] // 2, axis=-1)",
        new="x_BTHK.reshape(*x_BTHK.shape[:-1], -1, 2)[..., ::-1].reshape(x_BTHK.shape)",
        harm="RoPE pairs other components than Llama does: a model trained here works, a published one does not.",
        tests=(
            "model/test_transformer.py::test_rope_table_and_rotation",
            "model/test_transformer.py::test_equals_plain_form",
            "test_loading.py::test_logits_are_those_of_the_reference",
        ),
    ),
    Fault(
        "frozen-norms-are-trained",
        "llada_jax/model/lora.py",
        old='ADAPTERS = frozenset(f"{name}_{part}" for name in MATRICES for part in "ab")',
        new='ADAPTERS = frozenset(f"{n}_{p}" for n in MATRICES for p in "ab") | {"attn_norm", "ff_norm"}',
        harm="The weights of norms are trained with the adapters and lost when the adapters are merged.",
        tests=("model/test_lora.py::test_only_adapters_are_trained_and_have_moments",),
    ),
    Fault(
        "merge-without-the-scale",
        "llada_jax/model/lora.py",
        old="blocks[name], a, b, name, config.lora.alpha / config.lora.rank",
        new="blocks[name], a, b, name, config.lora.alpha",
        harm="Adapters are merged rank times too strongly, so the exported model is not the one that was validated.",
        tests=("model/test_lora.py::test_merge",),
    ),
    Fault(
        "norm-in-the-compute-dtype",
        "llada_jax/model/transformer.py",
        old="x_fp32 = x.astype(jnp.float32)\n",
        new="x_fp32 = x\n",
        harm="On accelerators RMSNorm is computed in bfloat16, although it must be fp32 there too.",
        tests=("model/test_transformer.py::test_rms_norm_casts_back_before_the_weight",),
    ),
    Fault(
        "gradient-of-mask-in-bfloat16",
        "llada_jax/model/transformer.py",
        old="x_BTD = table_VD[jnp.where(here, ids_BT - first, 0)] * here[..., None]",
        new="x_BTD = table_VD.astype(dtype)[jnp.where(here, ids_BT - first, 0)] * here[..., None]",
        harm="The gradients of all masked positions are summed in bfloat16, where most of a long sum is lost.",
        tests=("model/test_transformer.py::test_gradients_of_a_frequent_token_are_summed_in_fp32",),
    ),
    # devices
    Fault(
        "partition-spec-without-fsdp",
        "llada_jax/devices/mesh.py",
        old='"up_proj": P("fsdp", "tensor"),  # DF',
        new='"up_proj": P(None, "tensor"),  # DF',
        harm="Every device holds all of one matrix with its moments, so it may not fit where it should.",
        tests=("model/test_transformer.py::test_abstract_model_states_shapes_and_shardings",),
    ),
    Fault(
        "partition-spec-swapped",
        "llada_jax/devices/mesh.py",
        old='"embedding": P("tensor", "fsdp"),  # VD',
        new='"embedding": P("fsdp", "tensor"),  # VD',
        harm="On some meshes tokens are looked up in the wrong part of the embedding.",
        tests=("model/test_transformer.py::test_embedding_lookup_and_its_gradient",),
    ),
    Fault(
        "two-processes-read-the-same-rows",
        "llada_jax/devices/mesh.py",
        old="for first, last in sorted(slices) for row in range(first, last)]",
        new="for first, last in sorted(slices) for row in range(last - first)]",
        harm="Every host reads the first rows of the batch, so a run on N hosts sees one N-th of its data.",
        tests=(
            "devices/test_mesh.py::test_local_rows_of_one_of_several_processes",
            "devices/test_mesh.py::test_place_batch_and_local_rows_belong_together",
        ),
    ),
    # training
    Fault(
        "noise-by-the-row-in-its-micro-batch",
        "llada_jax/training/step.py",
        old="noisy = objective(key, batch, row_B, config.diffusion,",
        new="noisy = objective(key, batch, row_B % (config.batch_size // config.accumulation), config.diffusion,",
        harm="All micro-batches of a step have the same noise, so a run with accumulation is another, noisier run.",
        tests=(_STEP + "test_losses_equal_those_of_one_device[sizes0-4]",),
    ),
    Fault(
        "skipped-step-changes-the-moments",
        "llada_jax/training/step.py",
        old="""            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
            )
""",
        new="            params = jax.tree.map(lambda new, old: jnp.where(finite, new, old), params, state.params)\n",
        harm="One step that is not finite leaves NaN in Adam's moments, and every later step is lost.",
        tests=(_STEP + "test_a_non_finite_step_leaves_no_trace[1-q_proj-place0-nan]",),
    ),
    Fault(
        "norm-weights-decay",
        "llada_jax/training/optimizer.py",
        old="lambda path, _: not path[-1].key.endswith(_NO_MATRICES), params)",
        new="lambda path, _: True, params)",
        harm="Weight decay pulls the weights of norms towards zero, although they set a scale and no direction.",
        tests=("training/test_optimizer.py::test_decay_is_for_matrices",),
    ),
    Fault(
        "schedule-position-one-is-a-fraction",
        "llada_jax/training/optimizer.py",
        old="position = position * steps if isinstance(position, float) else position",
        new="position = position * steps if position <= 1 else position",
        harm="A point at step 1 of the schedule is taken for the end of the run.",
        tests=("training/test_optimizer.py::test_schedule_is_the_polyline",),
    ),
    Fault(
        "checkpoint-without-the-window",
        "llada_jax/training/loop.py",
        old='{"window": self.window.sums, "skipped_in_a_row": self.skipped_in_a_row}',
        new='{"skipped_in_a_row": self.skipped_in_a_row}',
        harm="The first loss that is logged after a resume leaves out the steps before the checkpoint.",
        tests=("training/test_resume.py::test_the_last_line_is_torn_and_steps_are_beyond_the_checkpoint",),
    ),
    Fault(
        "resume-reads-from-the-first-row",
        "llada_jax/training/loop.py",
        old="""        batches = data.iterate(
            self.first_step,
""",
        new="""        batches = data.iterate(
            0,
""",
        harm="A resumed run trains again on the rows that it began with, and never sees the last ones.",
        tests=("training/test_resume.py::test_the_last_line_is_torn_and_steps_are_beyond_the_checkpoint",),
    ),
    Fault(
        "exit-code-of-sigterm",
        "llada_jax/training/loop.py",
        old="return entry_point.PREEMPTED",
        new="return entry_point.FINISHED",
        harm="A run that was saved after SIGTERM reports that it is finished, so no launcher starts it again.",
        tests=("training/test_resume.py::test_sigterm_saves_and_the_run_goes_on[5]",),
    ),
    Fault(
        "retention-removes-permanent-checkpoints",
        "llada_jax/training/checkpoint.py",
        old="preservation_policy=preservation_policy.AnyPreservationPolicy(policies),",
        new="preservation_policy=policies[0],",
        harm="Checkpoints that the user asked to keep for good are removed with the rolling ones.",
        tests=("training/test_checkpoint.py::test_retention",),
    ),
    Fault(
        "second-owner-of-a-workdir",
        "llada_jax/training/ownership.py",
        old="fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        new="fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        harm="Two runs may write into one workdir, and each spoils the metrics and checkpoints of the other.",
        tests=("training/test_ownership.py::test_only_one_owner",),
    ),
    Fault(
        "torn-last-line-is-kept",
        "llada_jax/training/metrics.py",
        old="""        except (ValueError, KeyError, TypeError):
            continue
""",
        new="""        except (ValueError, KeyError, TypeError):
            kept.append(line)
""",
        harm="After a kill, metrics.jsonl keeps half a line, and every program that reads the file fails on it.",
        tests=("training/test_metrics.py::test_drop_after",),
    ),
    Fault(
        "tuning-starts-from-rounded-weights",
        "llada_jax/training/start.py",
        old="jnp.dtype(compute_dtype if adapts else jnp.float32)",
        new="jnp.dtype(compute_dtype)",
        harm="On accelerators a run that tunes all weights holds them in bfloat16, where small updates change nothing.",
        tests=("training/test_sources.py::test_weights_only",),
    ),
    Fault(
        "resume-forgets-the-steps-in-a-row",
        "llada_jax/training/loop.py",
        old='record.get("skipped_in_a_row", 0)',
        new="0",
        harm="A run that is often preempted never stops, although no step is finite any more.",
        tests=("training/test_ends.py::test_steps_that_are_not_finite_end_the_run",),
    ),
    Fault(
        "step-0-is-recorded-twice",
        "llada_jax/training/metrics.py",
        old="drop_after(path, first_step or -1)",
        new="drop_after(path, first_step)",
        harm="A run that was killed before its first checkpoint has two records of step 0 after its next start.",
        tests=("training/test_metrics.py::test_writer_and_resume_leave_no_step_twice",),
    ),
    Fault(
        "resume-loses-its-last-samples",
        "llada_jax/training/samples.py",
        old="int(found[1]) <= step]",
        new="int(found[1]) < step]",
        harm="Each resume removes the samples of the step that it continues from, and they are never written again.",
        tests=("training/test_summary.py::test_samples_up_to_the_step_of_a_resume_are_kept",),
    ),
)
