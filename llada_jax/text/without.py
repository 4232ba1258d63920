"""Makes tokenizers that never encode text as one of their tokens.

A model may use a token of ordinary text as its MASK. Such text must then be encoded in other tokens.
"""

import json
from typing import Any

from llada_jax.text.backends import NOT_A_TOKEN, Backend, HuggingFace, SentencePiece

_NEVER = "\U0010ffff\U0010fffe no text"  # the new name of the token, which no text contains


def without(backend: Backend, i: int) -> Backend | None:
    """Returns a copy of a tokenizer that encodes the text of token `i` as other tokens, or None if there is none.

    All other text is encoded as before. The copy is for encoding alone: its files are not those of the tokenizer.
    """
    changed = _without_piece(backend, i) if isinstance(backend, SentencePiece) else _without_entry(backend, i)
    if changed is None:
        return None
    text = backend.decode([i], True)
    if NOT_A_TOKEN in text:  # some bytes of a character, which no text consists of
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


def _without_entry(backend: HuggingFace, i: int) -> HuggingFace | None:
    content = json.loads(backend.files["tokenizer.json"])
    added = content.get("added_tokens") or []
    content["added_tokens"] = [token for token in added if token["id"] != i]
    model = content["model"]
    if isinstance(model["vocab"], list):  # Unigram
        if i == model.get("unk_id"):
            return None
        if i < len(model["vocab"]):
            model["vocab"][i] = [_NEVER, model["vocab"][i][1]]
    else:
        piece = next((piece for piece, number in model["vocab"].items() if number == i), None)
        if piece is not None:
            if piece == model.get("unk_token") or (len(piece) == 1 and backend.byte_level):  # a single byte
                return None
            model["vocab"] = {_NEVER if number == i else key: number for key, number in model["vocab"].items()}
            if "merges" in model:
                prefix = model.get("continuing_subword_prefix") or ""
                model["merges"] = [merge for merge in model["merges"] if not _has(merge, piece, prefix)]
    return HuggingFace({**backend.files, "tokenizer.json": json.dumps(content).encode()})


def _has(merge: Any, piece: str, prefix: str) -> bool:
    """Returns whether a merge of BPE, "a b" or ["a", "b"], makes or uses a piece."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return piece in (first, second, first + second.removeprefix(prefix))
