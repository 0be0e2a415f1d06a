"""Where stop strings end a request: at the token where transformers' `StopStringCriteria` ends `model.generate`.

That criterion prepares the whole vocabulary for each new set of strings, which takes a second for 150,000 tokens. Here
the vocabulary is prepared once, any number of sets costs nothing more, and a step looks closer only at the tokens that
hold a letter with which one of their strings ends.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase, StopStringCriteria


class TokenTexts:
    """What each token of a tokenizer adds to a text, as the criterion has it: bytes where tokens may hold parts of
    characters, otherwise strings. Ids that the tokenizer lacks add what no stop string has."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._size = tokenizer, len(tokenizer)
        mode = StopStringCriteria._get_stop_string_matching_mode(tokenizer)
        self._in_bytes = mode is not None
        texts, ids = StopStringCriteria.clean_tokenizer_vocab(tokenizer, stop_string_matching_mode=mode)
        foreign = b"\xff" if self._in_bytes else "\udfff"  # is in no valid text
        self._texts = [foreign] * (max(ids) + 2)  # the last one stands for all ids beyond
        for text, token in zip(texts, ids, strict=True):
            self._texts[token] = text
        self._letters = np.array([_letters(text) for text in self._texts], np.uint64)  # [ids]

    def are_of(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether these are `tokenizer`'s, with the tokens that it has now."""
        return self._tokenizer is tokenizer and self._size == len(tokenizer)

    def spell(self, string: str) -> str | bytes:
        return string.encode() if self._in_bytes else string

    def of(self, tokens: np.ndarray) -> list[str] | list[bytes]:
        return [self._texts[token] for token in np.minimum(tokens, len(self._texts) - 1).tolist()]

    def letters(self, tokens: np.ndarray) -> np.ndarray:
        """The set of letters of each of `tokens`, as `StopStrings.last_letters` has them: uint64."""
        return self._letters.take(tokens, mode="clip")


class StopStrings:
    """The strings that end a request.

    Args:
        strings (`Iterable[str]`): at least one, none empty.
        texts (`TokenTexts`): of the tokenizer.
        first (`int`): the strings must lie in the tokens from that one on.
    """

    def __init__(self, strings: Iterable[str], texts: TokenTexts, first: int = 0) -> None:
        self.texts = texts
        self._first = first
        self._strings = [texts.spell(string) for string in strings]
        self._window = max(len(string) for string in self._strings)  # tokens, as the criterion has it
        self.last_letters = 0
        for string in self._strings:
            self.last_letters |= _letters(string[-1:])

    def __repr__(self) -> str:
        return f"StopStrings({self._strings})"

    def end(self, tokens: np.ndarray) -> bool:
        """Whether a string ends within the last of `tokens` (int `[n]`, prompt and answer)."""
        parts = self.texts.of(tokens[max(self._first, len(tokens) - self._window) :])
        text = parts[0][:0].join(parts)
        before = len(text) - len(parts[-1])
        return any(text.find(string, max(0, before - len(string) + 1)) >= 0 for string in self._strings)


def _letters(text: str | bytes) -> int:
    """The set of letters (characters or bytes) in `text`, folded into 64 bits: letters of one bit may differ."""
    letters = 0
    for letter in set(text):
        letters |= 1 << ((letter if isinstance(letter, int) else ord(letter)) & 63)
    return letters
