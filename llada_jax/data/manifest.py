"""manifest.json: what a prepared set contains, written last and read first."""

import dataclasses
import hashlib
import json
import os
from typing import Any

from etils import epath

from llada_jax.config import UserError
from llada_jax.text.tokenizer import Tokenizer

FORMAT = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file."""

    name: str
    rows: int
    size: int  # bytes of the file
    sha256: str  # of the file


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of one split."""

    rows: int  # of packed text, or answers
    tokens: int  # EOS after documents included, padding of the last row not
    bytes: int  # of UTF-8 text; where there are answers, of theirs
    documents: int  # stretches of text, each ended by EOS, or conversations
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """What came from one input, both splits together."""

    input: str  # as given
    files: int
    documents: int
    tokens: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Chat:
    """What only a set of conversations has: its rows are answers with their prompts, see data/pairs.py."""

    template_sha256: str  # of the chat template
    too_long: str  # what was done with answers that are too long with their prompts: drop | cut
    group_key: str | None  # of conversations that are held out together; None = those that begin alike
    dropped: int  # answers left out because they, or their prompts, are too long
    cut: int  # answers that lost earlier turns of their prompt, or their own end
    empty: int  # answers left out because there is no text in them, or before them
    train_index: Shard  # the index beside the shards
    validation_index: Shard


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A prepared set.

    A row of text is a record of `8 + sequence_length * itemsize` bytes, little-endian: uint32 its true length in
    tokens, uint32 the bytes of text it stands for, then the ids in `dtype`, padded with EOS.
    """

    tokenizer_kind: str
    tokenizer_sha256: str
    tokenizer_size: int  # ids, control tokens included
    vocab_size: int  # tokenizer_size rounded up, the rows of an embedding
    bos_id: int
    eos_id: int
    mask_id: int
    start_header_id: int
    end_header_id: int
    eot_id: int
    sequence_length: int  # tokens per row; where rows are answers, at most
    dtype: str  # of the ids: uint16 | uint32
    validation_fraction: float
    validation_hash: str  # what is hashed, and how
    validation_below: int  # a document is held out if its hash is below this
    train: Split
    validation: Split
    sources: tuple[Source, ...]
    chat: Chat | None = None  # None = packed text
    format: int = FORMAT

    def to_json(self) -> str:
        """The content of manifest.json."""
        fields = dataclasses.asdict(self)
        if self.chat is None:
            del fields["chat"]  # as it was before there were conversations: the set is the same, its hash too
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"

    @property
    def sha256(self) -> str:
        """Identity of the data: it covers the hashes of all shards and of the tokenizer."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def split(self, name: str) -> Split:
        """The split "train" or "validation"."""
        return {"train": self.train, "validation": self.validation}[name]

    def index(self, name: str) -> Shard | None:
        """The index of a split, None where rows are text."""
        return self.chat and {"train": self.chat.train_index, "validation": self.chat.validation_index}[name]

    def files(self) -> list[Shard]:
        """All files that the rows lie in."""
        shards = [shard for name in SPLITS for shard in self.split(name).shards]
        return shards + [index for name in SPLITS if (index := self.index(name))]


def tokenizer_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says of the tokenizer."""
    roles = ("bos_id", "eos_id", "mask_id", "start_header_id", "end_header_id", "eot_id")
    return {
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_sha256": tokenizer.sha256,
        "tokenizer_size": tokenizer.size,
        "vocab_size": tokenizer.vocab_size,
        **{name: getattr(tokenizer, name) for name in roles},
    }


def load_manifest(directory: str | os.PathLike) -> Manifest:
    """Reads the manifest of a prepared set; `directory` may be anything etils.epath opens, such as gs://.

    Raises UserError if there is none, or one that is damaged or of another version.
    """
    file = epath.Path(directory) / MANIFEST_FILE
    try:
        content = file.read_text()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{directory} is not a prepared set (it has no {MANIFEST_FILE}): run llada_jax.prepare"
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
            return Manifest(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged: prepare the set again") from error
    raise UserError(f"{file} has format {version}, this version reads {FORMAT}: prepare the set again")
