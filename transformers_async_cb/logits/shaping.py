"""The nouns: rules for logits, all those of one request, and the tables that hold those of the running ones."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch


# Of a row's shaping as int32: first single numbers, then lists.
SHAPING_WORDS = 1024
HEAD_WORDS = 16
# Words of a token in a list; of a sequence, beside those of its tokens.
TOKEN_WORDS, SEQUENCE_WORDS = 2, 3


class Rule(IntEnum):
    """What is done to a token's logit, in the order in which `generate` does it."""

    EARLY_BIAS = 1  # add a value
    BAN = 2
    BAN_WHILE_SHORT = 3
    FORCE_LAST = 4
    SUPPRESS = 5
    SUPPRESS_FIRST = 6
    BIAS = 7  # add a value


class Listed(NamedTuple):
    """A rule for the last of some tokens, where the sequence ends with the others."""

    rule: Rule
    tokens: tuple[int, ...]
    value: float = 0.0


class Shaping(NamedTuple):
    """What is done to the logits of one request. Lengths are those of the sequence before the token to be picked.

    `tokens` are rules for single tokens, at most one of the kind that adds for each; `sequences` those for more, with
    those for the same last token after each other: what they add is added up before the logit sees it.
    """

    prompt_length: int
    repetition_penalty: float = 1.0  # on logits of all tokens so far
    presence_penalty: float = 0.0  # the same for all tokens generated so far
    frequency_penalty: float = 0.0  # for each time that a token was generated
    shortest: int = 0  # `BAN_WHILE_SHORT` below this length
    ngram: int = 0  # no sequence of so many tokens comes twice
    begin: int = -1  # length at which `SUPPRESS_FIRST` counts
    forced_first: int = -1  # the only token there is at length 1
    forced_last_at: int = -1  # length at which there are only the `FORCE_LAST` ones
    tokens: tuple[Listed, ...] = ()
    sequences: tuple[Listed, ...] = ()

    def words(self) -> np.ndarray:
        """As int32 `[SHAPING_WORDS or fewer]`.

        Raises:
            ValueError: the lists are too long.
        """
        lists: list[int] = []
        for rule, (token,), value in self.tokens:
            lists += (rule << 24 | token, _bits(value))
        start_of_sequences = HEAD_WORDS + len(lists)
        for i, (rule, tokens, value) in enumerate(self.sequences):
            following = self.sequences[i + 1] if i + 1 < len(self.sequences) else None
            closes = following is None or (following.rule, following.tokens[-1]) != (rule, tokens[-1])
            lists += (2 * rule + closes, _bits(value), len(tokens), *tokens)
        if HEAD_WORDS + len(lists) > SHAPING_WORDS:
            raise ValueError(
                f"the lists of tokens in its settings take {len(lists)} words, a request may have "
                f"{SHAPING_WORDS - HEAD_WORDS}: {TOKEN_WORDS} for each token, {SEQUENCE_WORDS} and its length for "
                "each sequence of several"
            )
        numbers = (self.prompt_length, self.shortest, self.ngram, self.begin, self.forced_first, self.forced_last_at)
        head = (
            _bits(self.repetition_penalty), _bits(self.presence_penalty), _bits(self.frequency_penalty),
            *(min(number, 2**31 - 1) for number in numbers),
            len(self.tokens), start_of_sequences, HEAD_WORDS + len(lists),
        )  # fmt: skip
        return np.array([*head, *[0] * (HEAD_WORDS - len(head)), *lists], np.int32)

    @classmethod
    def from_words(cls, words: np.ndarray) -> Shaping:
        floats = words.view(np.float32)
        count, at, end = words[9:12].tolist()
        listed = range(HEAD_WORDS, HEAD_WORDS + TOKEN_WORDS * count, TOKEN_WORDS)
        tokens = [Listed(Rule(words[i] >> 24), (int(words[i] & 0xFFFFFF),), float(floats[i + 1])) for i in listed]
        sequences = []
        while at < end:
            of_it = words[at + 3 : at + 3 + words[at + 2]].tolist()
            sequences.append(Listed(Rule(words[at] >> 1), tuple(of_it), float(floats[at + 1])))
            at += SEQUENCE_WORDS + len(of_it)
        prompt_length, *numbers = words[3:9].tolist()
        return cls(prompt_length, *floats[:3].tolist(), *numbers, tuple(tokens), tuple(sequences))


class Tables(NamedTuple):
    """What shaping knows of all rows, on the device. The last row is for padding."""

    history: torch.Tensor  # int32 [rows + 1, positions] tokens; current in rows that are shaped
    shapings: torch.Tensor  # int32 [rows + 1, SHAPING_WORDS]; current in rows that are shaped

    @classmethod
    def of(cls, rows: int, positions: int, device: torch.device) -> Tables:
        integers = {"dtype": torch.int32, "device": device}
        return cls(torch.zeros(rows + 1, positions, **integers), torch.zeros(rows + 1, SHAPING_WORDS, **integers))


def _bits(value: float) -> int:
    return int(np.array([value], np.float32).view(np.int32)[0])
