"""Changes the files of a published folder at random: each is read rightly, or refused in one line."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import PARITY
from safetensors.numpy import save

from llada_jax.config import ModelConfig, UserError
from llada_jax.formats import published, tensor_files
from llada_jax.formats.generation_config import with_ends
from llada_jax.text.named_ids import END_IDS, is_id
from llada_jax.text.tokenizer import find_tokenizer, load_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

FIELDS = json.loads((PARITY / "gqa" / "config.json").read_text())
MODEL = published.model_config(FIELDS)
EXAMPLES = pytest.mark.parametrize("examples", [60, pytest.param(240, marks=pytest.mark.slow)])

IDS = st.sampled_from(
    [0, 7, 500, 501, 511, 512, -1, 10**400, True, None, 7.0, math.nan, "7", [], [7], [500, 7], [7, "x"]]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | IDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def fuzz(strategy, check, examples):
    """Calls `check` with examples of the strategy. It returns, or raises a UserError of one line."""

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(strategy)
    def run(example):
        try:
            check(example)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000

    run()


@EXAMPLES
def test_config_json(examples):
    names = sorted({*FIELDS, *published.SUPPORTED, *END_IDS, "token_count", "rope_parameters", "mlp_ratio", "head_dim",
                    "architectures", "layer_types", "hidden_size", "tie_word_embeddings"})  # fmt: skip

    def check(changes):
        fields = FIELDS | changes
        config = published.model_config(fields)
        hash(config)
        assert {config.eos_id} - {None} | {*config.end_ids} == {
            i for name in END_IDS for i in (fields[name] if isinstance(fields.get(name), list) else [fields.get(name)])
        } - {None}
        assert config.mask_id not in config.end_ids
        assert all(is_id(i) and i < config.vocab_size for i in config.end_ids)

    fuzz(st.dictionaries(st.sampled_from(names), VALUES | IDS, max_size=3), check, examples)


@EXAMPLES
def test_generation_config_json(tmp_path, examples):
    path = tmp_path / "generation_config.json"

    def check(content):
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        config, notes = with_ends(MODEL, tmp_path)
        assert all(is_id(i) and i not in (500, 511) and i < 512 for i in config.end_ids)
        assert all("\n" not in note for note in notes)

    fields = st.dictionaries(st.sampled_from([*END_IDS, "temperature", "stop_strings", "top_p"]) | st.text(), VALUES)
    fuzz(fields | st.dictionaries(st.sampled_from(END_IDS), IDS) | VALUES | st.binary(), check, examples)


TENSORS = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abc")}


@EXAMPLES
def test_an_index_and_its_files(tmp_path, examples):
    """Whatever the files hold, each tensor that is read has the values that all its copies have."""
    names, expected = ["x.safetensors", "y.safetensors", "z.safetensors"], {name: (2, 3) for name in TENSORS}

    def check(example):
        weight_map, files, single = example
        for old in tmp_path.iterdir():
            old.unlink()
        for name, tensors in files.items():
            (tmp_path / name).write_bytes(save({tensor: TENSORS[tensor] + shift for tensor, shift in tensors.items()}))
        if single:
            (tmp_path / tensor_files.SINGLE).write_bytes(save(TENSORS))
        if weight_map is not None:
            (tmp_path / tensor_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with tensor_files.contextlib.ExitStack() as stack:
            folder = tensor_files.Folder(tmp_path, stack)
            folder.check(expected)
            for tensor in TENSORS:
                found = float(folder[tensor][:][0, 0]) - float(TENSORS[tensor][0, 0])
                if single:
                    assert found == 0
                elif weight_map is not None:
                    used = [files[name][tensor] for name in {*weight_map.values()} if tensor in files[name]]
                    assert {*used} == {found}

    maps = st.dictionaries(st.sampled_from("abc"), st.sampled_from(names)) | st.dictionaries(
        st.sampled_from(["a", "b", "q"]), st.sampled_from(names) | VALUES
    )
    files = st.dictionaries(
        st.sampled_from(names), st.dictionaries(st.sampled_from("abc"), st.sampled_from([0, 0, 0, 1]), min_size=1)
    )
    whole = st.just((dict.fromkeys("abc", "x.safetensors"), {"x.safetensors": dict.fromkeys("abc", 0)}, False))
    fuzz(st.tuples(st.none() | maps, files, st.booleans()) | whole, check, examples)


@EXAMPLES
def test_the_bytes_of_a_safetensors_file(tmp_path, examples):
    whole = save(TENSORS)

    def check(changes):
        content = bytearray(whole)
        for at, value in changes:
            content[at % len(content)] = value
        (tmp_path / tensor_files.SINGLE).write_bytes(content)
        with tensor_files.contextlib.ExitStack() as stack:
            folder = tensor_files.Folder(tmp_path, stack)
            folder.check({name: (2, 3) for name in TENSORS})
            assert all(folder[name][:].shape == (2, 3) for name in TENSORS)

    fuzz(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4), check, examples)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["The quiet fox walked and nobody said a word.\n" * 50], 300, folder)
    return folder


@EXAMPLES
def test_the_files_beside_a_tokenizer(tokenizer_folder, examples):
    """Whatever the files say, text never yields MASK unless this is told, and every id is a token or in a hole."""
    whole = find_tokenizer(tokenizer_folder)
    literals = st.sampled_from(["<|endoftext|>", "</s>", "the", "fox", "<|eot_id|>", "nowhere", None, 3, ["a"]])
    tokens = literals | literals.map(lambda literal: {"content": literal})
    roles = ("eos_token", "eot_token", "eom_token", "bos_token", "mask_token")
    named = st.dictionaries(st.sampled_from(roles), tokens) | st.dictionaries(st.sampled_from(END_IDS), IDS)
    model = st.dictionaries(
        st.sampled_from(["mask_token_id", "bos_token_id", "eos_token_id", "vocab_size"]),
        IDS | st.integers(0, 320) | VALUES,
    )

    def check(example):
        config, special, stated, generated = example
        files = {"tokenizer_config": config, "special_tokens_map": special, "config": stated}
        for name, fields in (files | {"generation_config": generated}).items():
            (tokenizer_folder / f"{name}.json").write_text(json.dumps(fields))
        tokenizer = load_tokenizer(tokenizer_folder)
        ids = tokenizer.encode("The quiet fox walked")
        assert tokenizer.decode(ids) == "The quiet fox walked" or set(ids) & {i for i, _ in tokenizer.roles.values()}
        assert tokenizer.mask_id not in ids or any("is read as MASK" in note for note in tokenizer.notes)
        in_holes = {i for first, end in tokenizer.holes(600) for i in range(first, end)}
        known = {*range(whole.own_size), *tokenizer.end_ids, *(i for i, _ in tokenizer.roles.values())}
        assert in_holes == {*range(600)} - known
        assert {tokenizer.eos_id, tokenizer.eot_id, tokenizer.mask_id}.isdisjoint(tokenizer.end_ids)

    fuzz(st.tuples(named, named, model, named.map(lambda fields: fields) | model), check, examples)


def test_model_config_is_the_default_of_the_fuzz():
    assert isinstance(MODEL, ModelConfig) and (MODEL.mask_id, MODEL.eos_id, MODEL.vocab_size) == (511, 500, 512)
