"""Opens the shards of prepared sets, and gives random access to their rows."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
from etils import epath

from llada_jax.config import UserError
from llada_jax.data.manifest import Manifest, load_manifest
from llada_jax.data.pairs import Pair, decode_pair
from llada_jax.data.rows import Row, decode_row

_OPEN_THREADS = 16  # shards checked in parallel when a run starts; on gs:// each check takes a round trip
_READER_OPTIONS = {"max_parallelism": "0"}  # the fastest setting for random access


class Rows:
    """Gives random access to the rows of one split of one set, and checks each row that it reads."""

    def __init__(self, path: str, manifest: Manifest, split: str, vocab_size: int):
        """Checks the shards and opens them.

        Args:
          path: The folder of the set.
          manifest: The manifest of the set.
          split: The name of the split.
          vocab_size: The vocabulary size of the model; every id must be below it.

        Raises:
          UserError: If a shard is missing or damaged.
        """
        self.path, self.manifest = path, manifest
        self._vocab_size = vocab_size
        self._shards = manifest.split(split).shards
        self._len = sum(shard.rows for shard in self._shards)
        folder = epath.Path(path)
        files = [str(folder / shard.name) for shard in self._shards]
        with ThreadPoolExecutor(_OPEN_THREADS) as executor:
            for _ in executor.map(_check_shard, files, self._shards):
                pass
        # If the name contains the number of rows, Grain opens a file only when it is first read.
        names = [f"{file}[0:{shard.rows}]" for file, shard in zip(files, self._shards, strict=True)]
        self._records = grain.sources.ArrayRecordDataSource(names, _READER_OPTIONS) if names else []

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> Row | Pair:
        decode = decode_pair if self.manifest.chat else decode_row
        try:
            row = decode(self._records[index], self.manifest.dtype, self.manifest.sequence_length)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self._place(index)} is damaged: {' '.join(str(error).split())}") from error
        highest = int(row.tokens.max())
        if highest >= self._vocab_size or int(row.tokens.min()) < 0:
            raise UserError(
                f"{self._place(index)} holds the token id {highest}, but the model's vocabulary ends at "
                f"{self._vocab_size}: the set has another tokenizer, or model.vocab_size is too small"
            )
        return row

    def _place(self, index: int) -> str:
        """Returns the file and the row in it, with which an error message begins."""
        for shard in self._shards:
            if index < shard.rows:
                return f"{epath.Path(self.path) / shard.name}, row {index},"
            index -= shard.rows
        raise IndexError(index)


def open_sets(paths: Sequence[str], split: str, sequence_length: int, vocab_size: int, chat: bool) -> list[Rows]:
    """Opens one split of every set. All manifests are checked before any shard is.

    Args:
      paths: The folders of the sets.
      split: The name of the split.
      sequence_length: T, which must be the sequence length of the sets.
      vocab_size: The vocabulary size of the model.
      chat: Whether the sets must hold conversations. False means that they must hold packed text.

    Raises:
      UserError: If a set cannot be used.
    """
    if not paths:
        raise UserError("config.data.path names no prepared set: give at least one folder")
    manifests = [load_manifest(path) for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        if chat != (manifest.chat is not None):
            held, wanted = ("conversations", "text") if manifest.chat else ("text", "conversations")
            raise UserError(
                f"{path} holds {held}, but config.diffusion.objective trains on {wanted}: "
                "choose another objective, or prepare the set with" + ("out" if manifest.chat else "") + " --chat"
            )
        if manifest.sequence_length != sequence_length:
            raise UserError(
                f"{path} was prepared for a sequence length of {manifest.sequence_length}, but sequence_length is "
                f"{sequence_length}: prepare the set again or change the setting"
            )
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256:
            raise UserError(f"{path} and {paths[0]} have different tokenizers: prepare both with the same one")
        if manifest.needed_rows > vocab_size:
            raise UserError(
                f"{path} has a tokenizer of {manifest.needed_rows} ids, but the model's vocabulary has only "
                f"{vocab_size}: model.vocab_size={manifest.vocab_size} would be large enough"
            )
        if chat and manifest.chat.template_sha256 != manifests[0].chat.template_sha256:
            raise UserError(f"{path} and {paths[0]} have different chat templates: prepare both with the same one")
    return [Rows(path, manifest, split, vocab_size) for path, manifest in zip(paths, manifests, strict=True)]


def _check_shard(file: str, shard: Any) -> None:
    """Raises UserError unless the file has the size that the manifest says and can be opened."""
    from array_record.python.array_record_module import ArrayRecordReader

    path = epath.Path(file)
    if not path.exists():
        raise UserError(f"{file} is missing: copy the whole folder, or prepare the set again")
    size = path.stat().length
    if size != shard.size:
        raise UserError(
            f"{file} is cut short or changed: it has {size:,} bytes, but the manifest says {shard.size:,}; "
            "copy it again, or prepare the set again"
        )
    try:
        reader = ArrayRecordReader(file, "readahead_buffer_size:0,max_parallelism:0")
        complete = reader.ok() and reader.num_records() == shard.rows
        reader.close()
    except RuntimeError:
        complete = False
    if not complete:
        raise UserError(f"{file} is damaged: copy it again, or prepare the set again")
