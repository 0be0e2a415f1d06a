"""How single tokens are written."""

from __future__ import annotations

import re
from typing import NamedTuple

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase


class Spelling(NamedTuple):
    """A token's text, or where that is no whole characters, its name in the vocabulary; and its bytes."""

    text: str
    bytes: list[int]


def spell(tokenizer: PreTrainedTokenizerBase, token: int) -> Spelling:
    """The spelling of a token, as it is in the middle of a text."""
    first = _decode(tokenizer, [token])
    if "\N{REPLACEMENT CHARACTER}" in first:
        name = tokenizer.convert_ids_to_tokens(token)
        return Spelling(name, _bytes_of(name))
    text = _decode(tokenizer, [token, token])[len(first) :]  # some tokenizers strip the space a text begins with
    return Spelling(text, list(text.encode()))


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies: those of Latin-1 that are seen for their own, those
    from U+0100 on for the other bytes in turn."""
    letters = sorted(ByteLevel.alphabet())
    own = [ord(letter) for letter in letters if ord(letter) < 256]
    return dict(zip(letters, own + sorted(set(range(256)).difference(own)), strict=True))


_BYTE_LETTERS = _byte_letters()


def _bytes_of(name: str) -> list[int]:
    """What a name in the vocabulary stands for, where a part of a character is one byte, or is of byte letters."""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return [int(byte[1], 16)]
    if all(letter in _BYTE_LETTERS for letter in name):
        return [_BYTE_LETTERS[letter] for letter in name]
    return list(name.encode())
