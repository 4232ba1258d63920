import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from paths import PYTHONPATH, ROOT

from llada_jax.config import UserError
from llada_jax.data.manifest import load_manifest
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.text.tokenizer import load_tokenizer

from .conftest import read_split, split_documents, story, write_jsonl

STORIES = [story(i, words=60) for i in range(300)]


def content(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def held_out(text: str, fraction: float) -> bool:
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return key < fraction * 2**64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Returns a compressed file of documents, and a .txt file that is long enough to be cut into pieces."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl.gz", STORIES)
    (folder / "long.txt").write_text("".join(story(i, words=300) for i in range(1000, 1150)), newline="")
    return [str(folder / "a.jsonl.gz"), str(folder / "long.txt")]


@pytest.fixture(scope="module")
def prepared(corpus, tokenizer_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "set"
    prepare(
        corpus,
        output,
        tokenizer=tokenizer_folder,
        sequence_length=64,
        validation_fraction=0.2,
        workers=1,
        shard_rows=300,
        progress=False,
    )
    return output


def small(inputs, output, **options):
    """Calls prepare() with settings that suit a small text."""
    return prepare(inputs, output, **{"sequence_length": 32, "workers": 1, "progress": False, **options})


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_bytes_from_any_number_of_workers(prepared, corpus, tokenizer_folder, tmp_path, workers):
    prepare(
        corpus,
        tmp_path / "again",
        tokenizer=tokenizer_folder,
        sequence_length=64,
        validation_fraction=0.2,
        workers=workers,
        shard_rows=300,
        progress=False,
    )
    assert content(tmp_path / "again") == content(prepared)
    assert os.listdir(tmp_path) == ["again"]


def test_what_is_in_the_folder(prepared, corpus, tokenizer_folder):
    manifest = load_manifest(prepared)
    assert len(manifest.train.shards) > 2
    shards = [*manifest.train.shards, *manifest.validation.shards]
    assert set(content(prepared)) == {"manifest.json", "tokenizer/tokenizer.model", *(f.name for f in manifest.files())}
    for shard in shards:
        file = prepared / shard.name
        assert (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) == (shard.size, shard.sha256)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert load_tokenizer(prepared / "tokenizer").sha256 == tokenizer.sha256 == manifest.tokenizer_sha256
    assert (manifest.eos_id, manifest.mask_id, manifest.vocab_size) == (tokenizer.eos_id, tokenizer.mask_id, 512)
    assert (manifest.dtype, manifest.sequence_length) == ("uint16", 64)
    assert [source.input for source in manifest.sources] == corpus
    both = (manifest.train, manifest.validation)
    for field in ("documents", "tokens", "bytes"):
        assert sum(getattr(s, field) for s in manifest.sources) == sum(getattr(s, field) for s in both)
    assert manifest.sources[0].documents == len(STORIES)
    assert manifest.sources[0].bytes == sum(len(text.encode()) for text in STORIES)
    assert manifest.sources[1].bytes == os.path.getsize(corpus[1])


def test_documents_come_back_exactly(prepared, corpus):
    manifest = load_manifest(prepared)
    train, validation = (split_documents(prepared, manifest, split) for split in ("train", "validation"))
    n_train = sum(not held_out(text, 0.2) for text in STORIES)
    assert train[:n_train] == [text for text in STORIES if not held_out(text, 0.2)]
    assert validation[: len(STORIES) - n_train] == [text for text in STORIES if held_out(text, 0.2)]
    assert (len(train), len(validation)) == (manifest.train.documents, manifest.validation.documents)
    # The runs of pieces of the long file, joined in their order, give the file again.
    long = Path(corpus[1]).read_bytes().decode()
    runs = sorted(train[n_train:] + validation[len(STORIES) - n_train :], key=long.index)
    assert len(runs) > 2
    assert "".join(runs) == long


def test_rows_are_packed_and_their_bytes_are_exact(prepared):
    manifest = load_manifest(prepared)
    counts = load_tokenizer(prepared / "tokenizer").token_bytes()
    for name in ("train", "validation"):
        rows, split = read_split(prepared, manifest, name), manifest.split(name)
        assert all(row.length == 64 for row in rows[:-1])
        assert (rows[-1].tokens[rows[-1].length :] == manifest.eos_id).all()
        assert len(rows) == split.rows
        assert sum(row.length for row in rows) == split.tokens
        assert sum(row.bytes for row in rows) == split.bytes
        assert [row.bytes for row in rows] == [int(counts[row.tokens[: row.length]].sum()) for row in rows]
        assert max(row.tokens.max() for row in rows) < manifest.tokenizer_size


def test_held_out_share(prepared):
    manifest = load_manifest(prepared)
    share = manifest.validation.bytes / (manifest.train.bytes + manifest.validation.bytes)
    assert 0.1 < share < 0.3


def test_nothing_held_out(tokenizer_folder, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", STORIES[:1])
    manifest = small([source], tmp_path / "set", tokenizer=tokenizer_folder, validation_fraction=0)
    assert (manifest.validation.rows, manifest.validation.shards) == (0, ())
    assert split_documents(tmp_path / "set", manifest, "train") == STORIES[:1]


def test_few_documents_hold_out_the_one_with_the_smallest_hash(tokenizer_folder, tmp_path):
    texts = STORIES[:4]
    assert not any(held_out(text, 0.01) for text in texts)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = small([source], tmp_path / "set", tokenizer=tokenizer_folder, validation_fraction=0.01)
    (out,) = split_documents(tmp_path / "set", manifest, "validation")
    rest = split_documents(tmp_path / "set", manifest, "train")
    assert [text for text in texts if text != out] == rest
    keys = {t: hashlib.blake2b(t.encode(), digest_size=8).digest()[::-1] for t in texts}
    assert min(texts, key=keys.get) == out


@pytest.mark.parametrize("texts", [["only one"], ["the same", "the same"]])
def test_too_few_documents_to_hold_one_out(tokenizer_folder, tmp_path, texts):
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match=r"validation_fraction=0$"):
        small([source], tmp_path / "set", tokenizer=tokenizer_folder)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_everything_held_out(tokenizer_folder, tmp_path):
    text = next(text for text in STORIES if held_out(text, 0.5))
    source = write_jsonl(tmp_path / "a.jsonl", [text, text])
    with pytest.raises(UserError, match="all of the text is held out"):
        small([source], tmp_path / "set", tokenizer=tokenizer_folder, validation_fraction=0.5)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_control_tokens_in_the_text_stay_text(tokenizer_folder, tmp_path):
    text = "[MASK] <|mdm_mask|> <|endoftext|> <|eot_id|>"
    source = write_jsonl(tmp_path / "a.jsonl", [text])
    manifest = small([source], tmp_path / "set", tokenizer=tokenizer_folder, validation_fraction=0)
    (row,) = read_split(tmp_path / "set", manifest, "train")[:1]
    ids = row.tokens[: row.length].tolist()
    assert manifest.mask_id not in ids
    assert manifest.eot_id not in ids
    assert split_documents(tmp_path / "set", manifest, "train") == [text]


def test_training_the_tokenizer(corpus, tmp_path):
    first = small(corpus, tmp_path / "a", train_tokenizer=420, workers=2, validation_fraction=0.1)
    small(corpus, tmp_path / "b", train_tokenizer=420, validation_fraction=0.1)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert first.tokenizer_size == 420
    assert split_documents(tmp_path / "a", first, "train")[0] in STORIES


def test_tokenizer_is_not_trained_on_held_out_text(tmp_path):
    documents = {word: story(i) + f" {word}" * 500 for i, word in enumerate(("zqzqzqzq", "xjxjxjxj"))}
    source = write_jsonl(tmp_path / "a.jsonl", list(documents.values()))
    manifest = small([source], tmp_path / "set", train_tokenizer=310, validation_fraction=0.01)
    (out,) = split_documents(tmp_path / "set", manifest, "validation")
    tokenizer = load_tokenizer(tmp_path / "set" / "tokenizer")
    for word, text in documents.items():
        tokens = len(tokenizer.encode(f" {word}"))
        assert tokens == 9 if text == out else tokens <= 2


def test_long_txt_with_a_prefixing_tokenizer(corpus, prefixing_model, tmp_path):
    manifest = small(corpus[1:], tmp_path / "set", tokenizer=prefixing_model, validation_fraction=0)
    assert split_documents(tmp_path / "set", manifest, "train") == [Path(corpus[1]).read_bytes().decode()]


def test_large_vocabulary_is_stored_in_32_bits(tmp_path, tokenizer_folder, monkeypatch):
    from llada_jax.text import tokenizer

    monkeypatch.setattr(tokenizer, "VOCAB_MULTIPLE", 1 << 17)
    source = write_jsonl(tmp_path / "a.jsonl", STORIES)
    manifest = small([source], tmp_path / "set", tokenizer=tokenizer_folder)
    assert manifest.dtype == "uint32"
    assert set(split_documents(tmp_path / "set", manifest, "train")) < set(STORIES)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "either tokenizer"),
        ({"tokenizer": "x", "train_tokenizer": 300}, "either tokenizer"),
        ({"train_tokenizer": 300, "sequence_length": 1}, "sequence_length=1"),
        ({"train_tokenizer": 300, "validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"train_tokenizer": 300, "validation_fraction": float("nan")}, "validation_fraction=nan"),
        ({"train_tokenizer": 300, "workers": -1}, "workers=-1"),
        ({"train_tokenizer": 5}, "too small"),
        ({"tokenizer": "/absent"}, "no tokenizer"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, words):
    source = write_jsonl(tmp_path / "a.jsonl", STORIES[:3])
    with pytest.raises(UserError, match=words) as error:
        small([source], tmp_path / "set", **settings)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_error_in_the_middle_leaves_nothing(tokenizer_folder, tmp_path):
    with open(write_jsonl(tmp_path / "a.jsonl", STORIES), "a") as file:
        file.write("{broken\n")
    for workers in (1, 2):
        with pytest.raises(UserError, match=f"a.jsonl, line {len(STORIES) + 1}: not JSON"):
            small([str(tmp_path / "a.jsonl")], tmp_path / "set", tokenizer=tokenizer_folder, workers=workers)
        assert os.listdir(tmp_path) == ["a.jsonl"]


def test_no_text_at_all(tokenizer_folder, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="no text in the input"):
        small([str(tmp_path / "a.txt")], tmp_path / "set", tokenizer=tokenizer_folder)


def interrupted(tmp_path, tokenizer_folder, number: int) -> tuple[int, list[int]]:
    """Sends a signal to a running preparation, and returns its exit code and the process ids of its workers."""
    source = write_jsonl(tmp_path / "a.jsonl", STORIES * 150)
    command = (
        "from llada_jax.data.prepare.prepare_text import prepare\n"
        f"prepare([{source!r}], {str(tmp_path / 'set')!r}, tokenizer={tokenizer_folder!r}, sequence_length=64,"
        " workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        # A background job of a shell starts with SIGINT ignored, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".set.preparing-*/train-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(child) for child in children.read_text().split()]
    assert len(workers) == 2
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode, workers


def wait_for_the_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "the workers are still running"
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through /proc")


@needs_proc
def test_killed_preparation_leaves_nothing_that_looks_finished(tmp_path, tokenizer_folder):
    code, workers = interrupted(tmp_path, tokenizer_folder, signal.SIGKILL)
    assert code == -signal.SIGKILL
    wait_for_the_end(workers)
    assert not (tmp_path / "set").exists()
    assert len(list(tmp_path.glob(".set.preparing-*"))) == 1
    # The next run removes the leftover folder and finishes.
    small([write_jsonl(tmp_path / "a.jsonl", STORIES)], tmp_path / "set", tokenizer=tokenizer_folder)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "set"]


@needs_proc
@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_interrupted_preparation_cleans_up(tmp_path, tokenizer_folder, number, expected):
    code, workers = interrupted(tmp_path, tokenizer_folder, number)
    assert code == expected
    wait_for_the_end(workers)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_from_a_script_without_a_main_guard(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "a.jsonl", STORIES)
    script = tmp_path / "script.py"
    script.write_text(
        "from llada_jax.data.prepare.prepare_text import prepare\n"
        f"m = prepare([{source!r}], 'set', tokenizer={tokenizer_folder!r}, sequence_length=64, workers=2)\n"
        "print(m.train.rows)\n"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 60}
    result = subprocess.run([sys.executable, str(script)], **run)
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout) == load_manifest(tmp_path / "set").train.rows > 100
    (tmp_path / "set").rename(tmp_path / "first")
    piped = subprocess.run([sys.executable, "-"], input=script.read_text(), **run)
    assert (piped.returncode, piped.stdout) == (0, result.stdout)


def test_dummy_prefix_is_not_counted(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    (tmp_path / "nfkc.model").write_bytes(model.getvalue())
    source = write_jsonl(tmp_path / "a.jsonl", STORIES)
    manifest = small([source], tmp_path / "set", tokenizer=str(tmp_path / "nfkc.model"))
    assert manifest.train.bytes + manifest.validation.bytes == sum(len(text.encode()) for text in STORIES)
    rows = read_split(tmp_path / "set", manifest, "train")
    assert np.sum([row.bytes for row in rows]) == manifest.train.bytes


def test_what_the_tokenizer_puts_in_front_of_a_text_begins_every_document(tokenizer_folder, tmp_path):
    """Long files, which are prepared in pieces, get it once; it stands for no bytes."""
    folder = tmp_path / "tokenizer"
    plain = load_tokenizer(tokenizer_folder)
    plain.save(folder)
    config = {"bos_token": plain.roles["bos"][1], "add_bos_token": True, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": plain.roles["eos"][1]}))
    source = write_jsonl(tmp_path / "a.jsonl", STORIES[:20])
    (tmp_path / "long.txt").write_text(long := "".join(map(story, range(300))))
    assert len(long) > 65_536
    manifests = [small([source, str(tmp_path / "long.txt")], tmp_path / name, tokenizer=str(each), workers=1,
                       validation_fraction=0)
                 for name, each in (("set", folder), ("plain", tokenizer_folder))]  # fmt: skip
    found, before = (
        np.concatenate([row.tokens[: row.length] for row in read_split(tmp_path / name, manifest, "train")]).tolist()
        for name, manifest in zip(("set", "plain"), manifests, strict=True)
    )
    wanted = [plain.bos_id]
    for i in before[:-1]:
        wanted += [i, plain.bos_id] if i == plain.eos_id else [i]
    assert found == [*wanted, plain.eos_id] and found.count(plain.bos_id) == 21
    assert manifests[0].train.bytes == manifests[1].train.bytes
    assert manifests[0].tokenizer_sha256 != manifests[1].tokenizer_sha256
