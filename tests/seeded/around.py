"""Faults around the model: in the command line, text, data, formats, plans, and the launch scripts."""

from seeded.fault import Fault

FAULTS = (
    # cli
    Fault(
        "config-mistake-without-its-line",
        "llada_jax/cli/entry_point.py",
        old="""{f'; {meant}' if meant else ''}{place}\"""",
        new="""{f'; {meant}' if meant else ''}\"""",
        harm="A mistake in a config file is reported without the line that it is in.",
        tests=("cli/test_entry_point.py::test_mistake_in_a_config_file",),
    ),
    Fault(
        "mistake-with-exit-code-1",
        "llada_jax/cli/entry_point.py",
        old="""    print_error(message)
    sys.exit(USER_ERROR)
""",
        new="""    print_error(message)
    sys.exit(FAILURE)
""",
        harm="A mistake of the user looks like a failure of the program to every script that reads the exit code.",
        tests=("cli/test_entry_point.py::test_wrong_flag",),
    ),
    Fault(
        "results-are-written-in-place",
        "llada_jax/cli/outputs.py",
        old="""        unfinished.write_bytes(content)
        unfinished.replace(path)
""",
        new="""        path.write_bytes(content)
""",
        harm="Whatever goes wrong while a file is written also destroys the file that was there before.",
        tests=("cli/test_outputs.py::test_a_failure_leaves_the_file_that_was_there",),
    ),
    # storage
    Fault(
        "lease-without-its-condition",
        "llada_jax/storage/objects.py",
        old="stamp = _call(path, lambda: store.write(name, content, if_equal=generation))",
        new="stamp = _call(path, lambda: store.write(name, content))",
        harm="Two launchers own the same workdir in a bucket, and each overwrites the checkpoints of the other.",
        tests=("storage/test_objects.py::test_conditional_writes",),
    ),
    Fault(
        "marked-as-whole-too-early",
        "llada_jax/storage/objects.py",
        old="key=lambda name: (name == last, name)",
        new="key=lambda name: (name != last, name)",
        harm="If a conversion or a preparation into a bucket dies, what is half-written is taken for whole.",
        tests=("storage/test_objects.py::test_what_makes_a_folder_whole_comes_last_and_goes_first",),
    ),
    Fault(
        "a-text-leaves-the-data-of-its-page",
        "llada_jax/cli/pages.py",
        old=r""".replace("<", "\\u003c")""",
        new=r""".replace("</", "<\\/")""",
        harm="A text with <!-- and <script in it swallows the end of the script, and the page stays empty.",
        tests=("sampling/test_replay.py::test_no_text_can_leave_the_data_of_the_page",),
    ),
    # text
    Fault(
        "message-writes-control-tokens",
        "llada_jax/text/chat_encoding.py",
        old="return self._encode_special(text, False, lambda part: part.translate(back))",
        new="return self._encode_special(text.translate(back), False)",
        harm="A user can end their own turn, or speak as the assistant, by typing the text of a control token.",
        tests=("text/test_chat_template.py::test_a_message_cannot_write_control_tokens",),
    ),
    Fault(
        "corpus-writes-control-tokens",
        "llada_jax/text/tokenizer.py",
        old="return self._encode_special(text, continuation) if special else self._encoder.encode(text, continuation)",
        new="return self._encode_special(text, continuation)",
        harm="A page about chat templates in the corpus teaches the model to end its turn in the middle of a text.",
        tests=(
            "text/test_tokenizer.py::test_control_tokens_only_on_request",
            "data/test_prepare.py::test_control_tokens_in_the_text_stay_text",
        ),
    ),
    Fault(
        "chat-template-outside-the-sandbox",
        "llada_jax/text/chat_template.py",
        old="environment = jinja2.sandbox.ImmutableSandboxedEnvironment(",
        new="environment = jinja2.Environment(",
        harm="Whoever publishes a model can run any program on the machine that loads its chat template.",
        tests=(
            "text/test_chat_template.py::test_templates_that_fail_are_one_line"
            "[{{ messages.append(1) }}-unsafe|not safely callable]",
        ),
    ),
    # data
    Fault(
        "answers-held-out-one-by-one",
        "llada_jax/data/prepare/prepare_chat.py",
        old="        writers[text_hash(conversation.group) < below].add(pairs)\n",
        new="""        for k, pair in enumerate(pairs):
            writers[text_hash(f"{conversation.group} {k}" if k else conversation.group) < below].add([pair])
""",
        harm="One conversation is partly learned and partly held out, so validation rewards learning by heart.",
        tests=("data/test_chat.py::test_rows_are_what_the_template_writes",),
    ),
    Fault(
        "padding-counts-in-the-sft-loss",
        "llada_jax/data/read/chat.py",
        old='"length": np.full(len(rows), longest, np.int32)',
        new='"length": np.full(len(rows), tokens_BT.shape[1], np.int32)',
        harm="Tuning learns from padding beyond the longest row of the batch, so EOS counts for too much.",
        tests=("data/test_chat.py::test_answers_are_padded_with_eos_to_the_longest_of_the_global_batch",),
    ),
    Fault(
        "exchanged-tokenizer-is-not-noticed",
        "llada_jax/data/sets.py",
        old="if sets.tokenizer.sha256 != sets.manifests[0].tokenizer_sha256:",
        new="if sets.tokenizer.kind != sets.manifests[0].tokenizer_kind:",
        harm="If the tokenizer in a prepared set was replaced, the model learns ids that decode to other text.",
        tests=("data/test_sets.py::test_an_exchanged_tokenizer_is_noticed",),
    ),
    Fault(
        "seeds-share-their-epochs",
        "llada_jax/data/read/pipeline.py",
        old='shuffle(seed=digest(seed, "shuffle", i) % 2**32)',
        new="shuffle(seed=(seed + i) % 2**32)",
        harm="The second epoch of seed 3 is the first one of seed 4, so runs with other seeds are not independent.",
        tests=("data/test_pipeline.py::test_seeds_do_not_share_epochs",),
    ),
    Fault(
        "tokenizer-sees-held-out-text",
        "llada_jax/data/prepare/prepare_text.py",
        old="(text for text in kept if text_hash(text) >= below)",
        new="kept",
        harm="The tokenizer is trained on the text that is held out, so the validation loss is too good.",
        tests=("data/test_prepare.py::test_tokenizer_is_not_trained_on_held_out_text",),
    ),
    Fault(
        "row-checksums-are-not-compared",
        "llada_jax/data/read/in_place.py",
        old='if self._shards[shard].index_sha256 and checksum(record) != int(entry["checksum"][0]):',
        new="if False:",
        harm="A shard in a bucket that was exchanged for that of another preparation is trained on without a word.",
        tests=("data/test_in_place.py::test_a_row_of_another_preparation_is_not_taken_for_its_own",),
    ),
    # formats
    Fault(
        "outage-counts-as-damage",
        "llada_jax/formats/arrays.py",
        old="if objects.is_bucket(path) and retries.storage_to_blame(error):",
        new="if False:",
        harm="After an outage of the storage, the newest checkpoint is put aside, and hours are computed again.",
        tests=("training/test_bucket.py::test_a_storage_that_fails_is_not_a_damaged_checkpoint",),
    ),
    Fault(
        "safetensors-offsets-of-float32",
        "llada_jax/formats/tensor_files.py",
        old="start, end = end, end + math.prod(shape) * dtype.itemsize",
        new="start, end = end, end + math.prod(shape) * 4",
        harm="An exported bfloat16 model cannot be read by any other program.",
        tests=("formats/test_huggingface.py::test_a_file_is_the_one_that_the_library_writes",),
    ),
    Fault(
        "query-and-key-permuted",
        "llada_jax/formats/huggingface.py",
        old="    return tensor[outputs, inputs].T.reshape(part_shape)\n",
        new="""    part = tensor[outputs, inputs].T.reshape(part_shape)
    return np.concatenate([part[..., ::2], part[..., 1::2]], -1) if name in ("q_proj", "k_proj") else part
""",
        harm="Query and key are permuted as for the other form of RoPE, so published models write nonsense.",
        tests=(
            "test_loading.py::test_logits_are_those_of_the_reference",
            "formats/test_huggingface.py::test_what_is_written_is_what_was_read[llada-sizes0]",
        ),
    ),
    Fault(
        "dtype-lost-in-conversion",
        "llada_jax/formats/conversion.py",
        old="dtypes={name: dtype for name, dtype in found.dtypes.items() if dtype != found.dtype},",
        new="dtypes={},",
        harm="A float16 or mixed model comes back from a conversion as float32, twice as large.",
        tests=("formats/test_conversion.py::test_float16_and_mixed_files_keep_each_tensors_dtype",),
    ),
    Fault(
        "fingerprint-is-not-checked",
        "llada_jax/formats/arrays.py",
        old="    _verify(tree, expected)\n",
        new="",
        harm="A checkpoint with damaged arrays is taken as it is, and the run goes on from wrong weights.",
        tests=("formats/test_conversion.py::test_damage_is_found",),
    ),
    Fault(
        "exported-config-names-another-dtype",
        "llada_jax/formats/conversion.py",
        old="published.published_config(model.config, naming, source.dtype, source.config.sequence_length)",
        new='published.published_config(model.config, naming, "float32", source.config.sequence_length)',
        harm="The config.json of an exported bfloat16 model says float32, so it is loaded in twice the memory.",
        tests=("formats/test_conversion.py::test_a_model_trained_here",),
    ),
    # planning
    Fault(
        "collectives-in-loops-count-once",
        "llada_jax/planning/hlo.py",
        old="visit(called, times * inner)",
        new="visit(called, times)",
        harm="A plan counts the traffic of a single layer, so it promises a far faster run.",
        tests=(
            "planning/test_collectives.py::test_loops_count_as_often_as_they_run",
            "planning/test_collectives.py::test_a_loop_that_depends_on_data_takes_the_given_count",
        ),
    ),
    Fault(
        "plan-without-temporaries",
        "llada_jax/planning/estimate.py",
        old='"fits": memory.peak_memory_in_bytes <= limit,',
        new='"fits": memory.argument_size_in_bytes <= limit,',
        harm="A plan says that a run fits although its activations do not, and the run fails on the reserved hardware.",
        tests=("planning/test_estimate.py::test_temporaries_need_memory_too",),
    ),
    # launch
    Fault(
        "mistake-is-tried-again",
        "launch/local.py",
        old="return not {FAILED, USER_ERROR} & set(codes)",
        new="return not {FAILED} & set(codes)",
        harm="The launcher starts a run again and again although a mistake of the user ends it each time.",
        tests=("launch/test_local.py::test_which_ends_are_tried_again[sys.exit(2 if me == 1 else 134)-2-1]",),
    ),
    Fault(
        "slurm-hides-a-mistake-behind-its-peers",
        "launch/slurm.sh",
        old="for final in 2 1; do",
        new="for final in 1; do",
        harm="A mistake that only one process reports is requeued under Slurm, because its peers abort with 134.",
        tests=("launch/test_launch.py::test_slurm_requeues_by_exit_code[2 134-2-False]",),
    ),
    Fault(
        "gke-counts-saves-as-crashes",
        "launch/gke.yaml",
        old='"FailJob rule at index [01]$"',
        new='"FailJob rule at index [0]$"',
        harm="On GKE each save after SIGTERM uses up a restart, so a long run on spot machines ends for good.",
        tests=("launch/test_launch.py::test_jobset_restarts_by_exit_code",),
    ),
    Fault(
        "tpu-pod-retries-a-mistake",
        "launch/tpu_pod.sh",
        old="if ((verdict < 128 || verdict == 130 || crashes > MAX_CRASHES)); then",
        new="if ((verdict == 130 || crashes > MAX_CRASHES)); then",
        harm="On a TPU pod a mistake of the user counts as a crash, so the training is started again in vain.",
        tests=("launch/test_tpu_pod.py::test_tpu_pod_restarts_by_exit_code[codes1-2-1]",),
    ),
)
