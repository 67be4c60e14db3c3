"""The bytes of every token id of a tokenizer: byte-level BPE, SentencePiece pieces, WordPiece, or whatever it says."""

from __future__ import annotations

import json
import re
from typing import Any

from exegete.errors import InputError
from exegete.tokens import TokenTable

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's map from printable characters to the bytes they stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def token_table(tokenizer: Any) -> TokenTable:
    """Return the bytes of every id of a Hugging Face tokenizer; ids that no token has stand for nothing.

    Raises InputError when the tokenizer has no vocabulary.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if not vocabulary:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no vocabulary")
    added = {int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
    plain = {text: i for text, i in vocabulary.items() if i not in added}
    scheme = _scheme(tokenizer, plain)
    pieces = [b""] * (1 + max([*vocabulary.values(), *added]))
    alphabet = byte_alphabet()
    for text, i in plain.items():
        pieces[i] = _piece(text, scheme, alphabet, tokenizer)
    for i, text in added.items():
        pieces[i] = text.encode()
    return TokenTable(pieces, (i for i in tokenizer.all_special_ids if i < len(pieces)))


def _piece(text: str | bytes, scheme: str, alphabet: dict[str, int], tokenizer: Any) -> bytes:
    if isinstance(text, bytes):  # some tokenizers of single bytes list them as they are
        return text
    if scheme == "bytes" and all(c in alphabet for c in text):
        return bytes(alphabet[c] for c in text)
    if scheme == "sentencepiece":
        byte = _BYTE.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()
    if scheme == "wordpiece":
        return text.removeprefix("##").encode() if text.startswith("##") else f" {text}".encode()
    return str(tokenizer.convert_tokens_to_string([text])).encode()


def _scheme(tokenizer: Any, plain: dict[str, int]) -> str:
    """Tell how pieces stand for text: by the tokenizer's decoder where it says so, else by the look of its pieces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored = json.loads(backend.to_str()) if backend is not None else {}
    decoder = json.dumps(stored.get("decoder"), ensure_ascii=False)
    if '"ByteLevel"' in decoder:
        return "bytes"
    if '"Metaspace"' in decoder or '"ByteFallback"' in decoder or _SPACE in decoder:
        return "sentencepiece"
    if '"WordPiece"' in decoder:
        return "wordpiece"
    texts = [text for text in plain if isinstance(text, str)]
    if any(text.startswith(_SPACE) or _BYTE.fullmatch(text) for text in texts):
        return "sentencepiece"
    alphabet = byte_alphabet()
    if any(text.startswith("Ġ") for text in texts) and all(c in alphabet for text in texts for c in text):
        return "bytes"
    return "generic"
