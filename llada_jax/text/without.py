"""Makes tokenizers that never encode text as one of their tokens.

A model may use a token of ordinary text as its MASK. Such text must then be encoded in other tokens.
"""

import json
from typing import Any

from llada_jax.text.backends import NOT_A_TOKEN, Backend, HuggingFace, SentencePiece

_INNER = "##"  # how WordPiece marks a piece that does not begin a word
_NEVER = "\U0010ffff\U0010fffe no text"  # the new name of the token, which no text contains


def without(backend: Backend, i: int) -> Backend | None:
    """Returns a copy of a tokenizer that encodes the text of token `i` as other tokens, or None if there is none.

    All other text is encoded as before. The copy is for encoding alone: its files are not those of the tokenizer.
    """
    if isinstance(backend, SentencePiece):
        changed, whole = _without_piece(backend, i), True
    else:
        changed, whole = _without_entry(backend, i)
    text = backend.decode([i], True)
    if changed is None or not whole or NOT_A_TOKEN in text:  # some bytes of a character are no text
        return changed
    ids = changed.encode(text, True)
    return changed if i not in ids and changed.decode(ids, True) == text else None


def _without_piece(backend: SentencePiece, i: int) -> SentencePiece | None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(backend.files["tokenizer.model"])
    if i >= len(proto.pieces):  # a token that the files beside the model add
        return None
    piece = proto.pieces[i]
    if piece.type not in (piece.NORMAL, piece.USER_DEFINED):
        return None
    piece.type = piece.UNUSED
    return SentencePiece({**backend.files, "tokenizer.model": proto.SerializeToString()})


def _without_entry(backend: HuggingFace, i: int) -> tuple[HuggingFace | None, bool]:
    """Returns the copy, and whether the text of the token can stand alone: inner pieces of WordPiece cannot."""
    content = json.loads(backend.files["tokenizer.json"])
    for token in content.get("added_tokens") or []:
        if token["id"] == i:
            token["content"] = _NEVER
    model, whole = content["model"], True
    if isinstance(model["vocab"], list):  # Unigram
        if i == model.get("unk_id"):
            return None, True
        if i < len(model["vocab"]):
            model["vocab"][i] = [_NEVER, model["vocab"][i][1]]
    elif (piece := next((piece for piece, number in model["vocab"].items() if number == i), None)) is not None:
        inner = piece.removeprefix(_INNER)
        whole = model.get("type") != "WordPiece" or piece == inner
        if piece == model.get("unk_token") or (backend.byte_level and len(piece) == 1):
            return None, True
        if not whole and (len(inner) == 1 or any(_INNER + character not in model["vocab"] for character in inner)):
            return None, False
        model["vocab"] = {_NEVER if number == i else name: number for name, number in model["vocab"].items()}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [merge for merge in model["merges"] if not _has(merge, piece, prefix)]
    return HuggingFace({**backend.files, "tokenizer.json": json.dumps(content).encode()}), whole


def _has(merge: Any, piece: str, prefix: str) -> bool:
    """Returns whether a merge of BPE, "a b" or ["a", "b"], makes or uses a piece."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return piece in (first, second, first + second.removeprefix(prefix))
