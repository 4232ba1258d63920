"""Tests sets in a bucket, with a file system in memory that stands in for gs://."""

import json
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
import tiny
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from llada_jax.config import UserError
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.read.chat import ChatData
from llada_jax.data.read.remote import local_copy
from llada_jax.storage import retries
from llada_jax.text.tokenizer import load_tokenizer
from llada_jax.training.run import train


class Bucket(MemoryFileSystem):
    """A gs:// file system in memory. `opened` lists the names of the files that were opened."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs, opened = {}, [""], []

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

    def _open(self, path, mode="rb", **options):
        self.opened.append(path.rsplit("/", 1)[-1])
        return super()._open(path, mode, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    corpus = tiny.write_corpus(folder / "corpus.jsonl")
    prepare([corpus], folder / "set", train_tokenizer=320, sequence_length=32, workers=1, shard_rows=200,
            progress=False)  # fmt: skip
    return folder / "set"


@pytest.fixture
def bucket(prepared, monkeypatch):
    """Returns a file system in which gs://bucket/set is the prepared set."""
    for name in Bucket.protocol:
        monkeypatch.setitem(_registry, name, Bucket)
    forget = backend._FileSystemSpecBackend._get_filesystem.cache_clear
    forget()
    Bucket.store.clear(), Bucket.pseudo_dirs.clear(), Bucket.opened.clear()
    system = fsspec.filesystem("gs")
    system.put(str(prepared), "gs://bucket/set", recursive=True)
    Bucket.opened.clear()
    yield system
    forget()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_is_copied_whole_and_once(bucket, prepared, tmp_path):
    lines = []
    folder = local_copy("gs://bucket/set", str(tmp_path), lines.append)
    assert Path(folder).parent == tmp_path and files(Path(folder)) == files(prepared)
    shards = len(list(prepared.glob("*.arrayrecord")))  # each with its row index
    assert shards > 3 and len(lines) == 1 and f"copying {2 * shards} files" in lines[0]
    Bucket.opened.clear()
    assert local_copy("gs://bucket/set", str(tmp_path), lines.append) == folder
    assert Bucket.opened == ["manifest.json"] and len(lines) == 1


def test_conversations_are_copied_with_their_index(bucket, prepared, tmp_path):
    lines = [{"prompt": f"fox {i}", "response": "child " * (i % 5 + 1)} for i in range(40)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"tokenizer": str(prepared), "sequence_length": 64, "workers": 1, "progress": False}
    prepare_chat([str(tmp_path / "c.jsonl")], tmp_path / "chat", **settings)
    bucket.put(str(tmp_path / "chat"), "gs://bucket/chat", recursive=True)
    folder = local_copy("gs://bucket/chat", str(tmp_path / "cache"), lambda line: None)
    assert files(Path(folder)) == files(tmp_path / "chat")
    data = ChatData([folder], seed=0, batch_size=4, sequence_length=64, vocab_size=512)
    assert data.batch(0, range(4))["tokens"].shape[0] == 4


def test_a_copy_that_was_broken_off_goes_on(bucket, prepared, tmp_path):
    folder = Path(local_copy("gs://bucket/set", str(tmp_path), lambda line: None))
    (folder / "manifest.json").unlink()
    (folder / "train-00001.arrayrecord").write_bytes(b"half")
    (folder / "train-00002.arrayrecord").rename(folder / "train-00002.arrayrecord.tmp")
    shutil.rmtree(folder / "tokenizer")
    Bucket.opened.clear()
    local_copy("gs://bucket/set", str(tmp_path), lambda line: None)
    assert {name for name in Bucket.opened if "arrayrecord" in name} == {
        "train-00001.arrayrecord", "train-00002.arrayrecord"
    }  # fmt: skip
    assert files(folder) == files(prepared)


def test_a_run_reads_from_a_bucket(bucket, prepared, tmp_path):
    config = tiny.get_config()
    config.steps, config.validation.rows, config.sampling.prompts = 2, 0, ()
    config.data.path, config.data.cache, config.data.copy = "gs://bucket/set", str(tmp_path / "cache"), True
    assert train(config, tmp_path / "bucket") == 0
    config = tiny.get_config()
    config.steps, config.validation.rows, config.sampling.prompts = 2, 0, ()
    config.data.path = str(prepared)
    assert train(config, tmp_path / "folder") == 0
    assert tiny.records(tmp_path / "bucket") == tiny.records(tmp_path / "folder")
    tokenizer = load_tokenizer(tmp_path / "bucket" / "tokenizer")
    assert tokenizer.sha256 == load_tokenizer(prepared / "tokenizer").sha256


def test_what_is_wrong_with_a_remote_set(bucket, tmp_path, monkeypatch):
    def copy():
        local_copy("gs://bucket/set", str(tmp_path / "cache"), lambda line: None)

    with pytest.raises(UserError, match="gs://bucket/none is not a prepared set"):
        local_copy("gs://bucket/none", str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be copied to .*file.*; set config.data.cache to use another folder"):
        local_copy("gs://bucket/set", str(tmp_path / "file"), lambda line: None)
    name = "/bucket/set/train-00000.arrayrecord"
    content = bucket.cat(name)
    bucket.pipe(name, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="train-00000.arrayrecord is not what the manifest says"):
        copy()
    bucket.rm(name)
    with pytest.raises(UserError, match="train-00000.arrayrecord is missing"):
        copy()
    assert not list((tmp_path / "cache").rglob("manifest.json")), "a half-finished copy looks like a complete set"
    bucket.pipe(name, content)
    copy()

    def no_network(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Bucket, "_open", no_network)
    monkeypatch.setattr(retries, "POLICY", retries.Policy(tries=3, first_wait=0.01))
    with pytest.raises(
        retries.StorageFailed, match="failed 3 times in .*ConnectionError: no route to host: 'gs://bucket/set'"
    ):
        local_copy("gs://bucket/set", str(tmp_path / "other"))


def test_without_gcsfs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for name in Bucket.protocol:
        monkeypatch.delitem(_registry, name, raising=False)  # it is there if gcsfs was used before
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    with pytest.raises(UserError, match=r"gs://bucket/set: .*pip install 'llada_jax\[gcs\]'"):
        local_copy("gs://bucket/set", str(tmp_path))
