"""Defines manifest.json, which says what a prepared set contains; it is written last and read first."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from llada_jax.config import UserError
from llada_jax.data.row_index import index_name, index_size
from llada_jax.storage import ranges
from llada_jax.text.tokenizer import Tokenizer

FORMAT = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Describes one file of a prepared set: an ArrayRecord file, or the index of a split."""

    name: str
    rows: int
    size: int  # size of the file in bytes
    sha256: str  # sha256 of the file
    index_sha256: str = ""  # sha256 of the row index of a shard, see data/row_index.py; "" if it has none


@dataclasses.dataclass(frozen=True)
class Split:
    """Describes the rows of one split."""

    rows: int  # number of rows of packed text, or of answers
    tokens: int  # number of tokens; EOS after a document counts, the padding of the last row does not
    bytes: int  # bytes of UTF-8 text; for conversations, the text of the answers only
    documents: int  # number of stretches of text, each ended by EOS, or of conversations
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """Counts what came from one input, over both splits."""

    input: str  # the input as the user gave it
    files: int
    documents: int
    tokens: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Counts the bad documents, or conversations, of one kind that `on_error="skip"` left out."""

    kind: str  # what is wrong with them, for example "not JSON"
    count: int
    examples: tuple[str, ...]  # the first of them in the order of the input: file, line and reason


@dataclasses.dataclass(frozen=True)
class FilteredSource:
    """Counts what the filters of a preparation left out of one input."""

    input: str  # the input as the user gave it
    documents: int  # number of documents that were judged
    removed: dict[str, int]  # number of documents left out, by the reason
    lines: int  # number of lines that C4's rules removed from documents that stay


@dataclasses.dataclass(frozen=True)
class Filtered:
    """Says which filters a preparation had, and what they left out; data/prepare/filters.py explains them."""

    dedupe: str
    quality: tuple[str, ...]
    languages: tuple[str, ...]
    decontaminate: tuple[str, ...]  # name and sha256 of each file
    sources: tuple[FilteredSource, ...]
    examples: dict[str, tuple[str, ...]]  # the first documents of each reason: where they are, and how they begin


@dataclasses.dataclass(frozen=True)
class Chat:
    """Holds what only the manifest of a set of conversations has; data/pairs.py explains the rows of such a set."""

    template_sha256: str  # sha256 of the chat template
    too_long: str  # what was done with an answer that is too long together with its prompt: drop | cut
    # Conversations with the same value under this key were held out together. None means that conversations with the
    # same messages before the first answer were held out together.
    group_key: str | None
    dropped: int  # number of answers left out because they, or their prompts, are too long
    cut: int  # number of answers that lost earlier turns of their prompt, or their own end
    empty: int  # number of answers left out because they, or all messages before them, have no text
    train_index: Shard  # the index file of the split; it lies beside the shards
    validation_index: Shard
    context_only: int = 0  # number of answers that the data marks as not to be learned, and that are only context


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes a prepared set.

    A row of packed text is a little-endian record of `8 + sequence_length * itemsize` bytes. It has three parts: the
    row's true length in tokens (uint32), the number of bytes of text that the row stands for (uint32), and
    `sequence_length` ids in `dtype`, padded with EOS. data/pairs.py describes the records of conversations.
    """

    tokenizer_kind: str
    tokenizer_sha256: str
    tokenizer_size: int  # number of ids, control tokens included
    vocab_size: int  # tokenizer_size rounded up to a multiple of 128; the number of rows of an embedding
    bos_id: int
    eos_id: int
    mask_id: int
    start_header_id: int
    end_header_id: int
    eot_id: int
    sequence_length: int  # tokens per row of packed text; for conversations, the maximum number of tokens per row
    dtype: str  # dtype of the ids: uint16 | uint32
    validation_fraction: float
    validation_hash: str  # what is hashed to choose the held-out text, and how it is hashed
    validation_below: int  # a document, or a group of conversations, is held out if its hash is below this number
    train: Split
    validation: Split
    sources: tuple[Source, ...]
    chat: Chat | None = None  # None for packed text
    left_out: tuple[LeftOut, ...] = ()  # bad documents or conversations that are not in the set, the largest kind first
    filtered: Filtered | None = None  # None if there were no filters
    format: int = FORMAT

    def to_json(self) -> str:
        """Returns the content of manifest.json."""
        fields = dataclasses.asdict(self)
        # Sets that were prepared before these fields existed keep their hash.
        if self.chat is None:
            del fields["chat"]
        elif not self.chat.context_only:
            del fields["chat"]["context_only"]
        if not self.left_out:
            del fields["left_out"]
        if self.filtered is None:
            del fields["filtered"]
        for shard in _shards_in(fields):
            if not shard["index_sha256"]:
                del shard["index_sha256"]
        return _json(fields)

    @property
    def sha256(self) -> str:
        """Returns the hash that identifies the data. It covers the hashes of all shards and of the tokenizer.

        It does not cover the row indices, which follow from the shards: a set has the same hash with and without them.
        """
        fields = json.loads(self.to_json())
        for shard in _shards_in(fields):
            shard.pop("index_sha256", None)
        return hashlib.sha256(_json(fields).encode()).hexdigest()

    @property
    def needed_rows(self) -> int:
        """The number of rows that an embedding needs for the tokens of the set.

        At the end of a tokenizer there may be tokens that no row contains: MASK, and the tokens of a chat template if
        the rows do not use it. The embedding needs no rows for them.
        """
        unused = {self.bos_id, self.mask_id, self.start_header_id, self.end_header_id, self.eot_id} - {self.eos_id}
        size = self.tokenizer_size
        while size - 1 in unused:
            size -= 1
        return size

    def split(self, name: str) -> Split:
        """Returns the split with the name "train" or "validation"."""
        return {"train": self.train, "validation": self.validation}[name]

    def index(self, name: str) -> Shard | None:
        """Returns the index file of a split, or None if the rows are packed text."""
        return self.chat and {"train": self.chat.train_index, "validation": self.chat.validation_index}[name]

    def files(self) -> list[Shard]:
        """Returns all shards and their row indices and, for conversations, the index files."""
        shards = [shard for name in SPLITS for shard in self.split(name).shards]
        rows = [
            Shard(index_name(shard.name), shard.rows, index_size(shard.rows), shard.index_sha256)
            for shard in shards
            if shard.index_sha256
        ]
        return shards + rows + [index for name in SPLITS if (index := self.index(name))]


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=1, sort_keys=True) + "\n"


def _shards_in(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the fields of all files that the fields of a manifest name."""
    chat = fields.get("chat") or {}
    shards = [shard for name in SPLITS for shard in fields[name]["shards"]]
    return shards + [chat[name] for name in ("train_index", "validation_index") if name in chat]


def tokenizer_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the fields of a manifest that describe the tokenizer."""
    roles = ("bos_id", "eos_id", "mask_id", "start_header_id", "end_header_id", "eot_id")
    return {
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_sha256": tokenizer.sha256,
        "tokenizer_size": tokenizer.size,
        "vocab_size": tokenizer.vocab_size,
        **{name: getattr(tokenizer, name) for name in roles},
    }


def read_file(file: epath.Path) -> bytes:
    """Returns the content of a small file of a set; a request that a bucket fails to answer is repeated.

    Raises:
      FileNotFoundError: If there is no such file.
      UserError, StorageFailed: If the bucket cannot be read.
    """
    if not ranges.supported(os.fspath(file)):
        return file.read_bytes()
    return ranges.Folder(os.fspath(file.parent)).whole(file.name)


def load_manifest(
    directory: str | os.PathLike, read: Callable[[epath.Path], bytes] = epath.Path.read_bytes
) -> Manifest:
    """Reads the manifest of a prepared set.

    Args:
      directory: The folder of the set. It may be any path that etils.epath opens, for example one on gs://.
      read: The function that reads the file.

    Raises:
      UserError: If the folder has no manifest, or if the manifest is damaged or has another format version.
      StorageFailed: If the folder is in a bucket that does not answer.
    """
    file = epath.Path(directory) / MANIFEST_FILE
    try:
        content = read(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{directory} is not a prepared set, because it has no {MANIFEST_FILE}: run python -m llada_jax.prepare"
        ) from error
    try:
        fields: dict[str, Any] = json.loads(content)
        version = fields["format"]
        if version == FORMAT:
            for name in SPLITS:
                shards = tuple(Shard(**shard) for shard in fields[name].pop("shards"))
                fields[name] = Split(**fields[name], shards=shards)
            if chat := fields.get("chat"):
                indices = {name: Shard(**chat[name]) for name in ("train_index", "validation_index")}
                fields["chat"] = Chat(**{**chat, **indices})
            fields["sources"] = tuple(Source(**source) for source in fields["sources"])
            fields["left_out"] = tuple(
                LeftOut(**{**kind, "examples": tuple(kind["examples"])}) for kind in fields.get("left_out", ())
            )
            if filtered := fields.get("filtered"):
                fields["filtered"] = _filtered(filtered)
            return Manifest(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: prepare the set again") from error
    raise UserError(
        f"{file} has format {version}, but this version of llada_jax reads format {FORMAT}: prepare the set again"
    )


def _filtered(fields: dict[str, Any]) -> Filtered:
    lists = {name: tuple(fields[name]) for name in ("quality", "languages", "decontaminate")}
    sources = tuple(FilteredSource(**source) for source in fields["sources"])
    examples = {reason: tuple(found) for reason, found in fields["examples"].items()}
    return Filtered(**{**fields, **lists, "sources": sources, "examples": examples})
