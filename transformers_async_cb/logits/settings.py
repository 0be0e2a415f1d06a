"""From a generation config to the shaping of a request's logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import isnan
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from .custom import Processor
from .shaping import Listed, Rule, Shaping


# `GenerationConfig` fields, and settings that it has no fields for.
LOGITS_FIELDS = {
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "min_length", "min_new_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip
OWN_LOGITS_FIELDS = {"presence_penalty", "frequency_penalty", "logit_bias"}

_NEVER = float("-inf")

# What `generate` makes of each of `LogitsSettings`.
_CLASSES = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "min_length": MinLengthLogitsProcessor,
    "min_new_tokens": MinNewTokensLengthLogitsProcessor,
    "ngram": NoRepeatNGramLogitsProcessor,
    "forced_first": ForcedBOSTokenLogitsProcessor,
    "forced_last": ForcedEOSTokenLogitsProcessor,
    "suppressed": SuppressTokensLogitsProcessor,
    "suppressed_first": SuppressTokensAtBeginLogitsProcessor,
    "sequence_bias": SequenceBiasLogitsProcessor,
    "bad_words": NoBadWordsLogitsProcessor,
}


class LogitsSettings(NamedTuple):
    """What a `GenerationConfig` says about logits, and the penalties and biases of OpenAI's interface
    (https://platform.openai.com/docs/api-reference/completions/create)."""

    vocabulary: int
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_length: int = 0
    min_new_tokens: int | None = None
    ngram: int = 0
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, config: GenerationConfig, own: dict[str, Any], vocabulary: int) -> LogitsSettings | None:
        """`None` where nothing is asked for. What transformers' own processors take for valid is.

        Raises:
            ValueError: a value is not valid, or a token outside the vocabulary.
        """
        repetition_penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
        RepetitionPenaltyLogitsProcessor(repetition_penalty)
        if config.no_repeat_ngram_size:
            NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
        if config.bad_words_ids:
            NoBadWordsLogitsProcessor(config.bad_words_ids)
        sequence_bias = SequenceBiasLogitsProcessor(config.sequence_bias).sequence_bias if config.sequence_bias else {}
        bias = own.get("logit_bias") or {}
        if not isinstance(bias, Mapping):
            raise ValueError(f"logit_bias must be a dictionary from token ids to numbers, got {bias!r}")
        settings = cls(
            vocabulary,
            repetition_penalty=repetition_penalty,
            presence_penalty=_number("presence_penalty", own.get("presence_penalty")),
            frequency_penalty=_number("frequency_penalty", own.get("frequency_penalty")),
            min_length=_length("min_length", config.min_length) or 0,
            min_new_tokens=_length("min_new_tokens", config.min_new_tokens),
            ngram=config.no_repeat_ngram_size or 0,
            forced_first=next(iter(_tokens("forced_bos_token_id", config.forced_bos_token_id, vocabulary)), None),
            forced_last=_tokens("forced_eos_token_id", config.forced_eos_token_id, vocabulary),
            suppressed=_tokens("suppress_tokens", config.suppress_tokens),
            suppressed_first=_tokens("begin_suppress_tokens", config.begin_suppress_tokens),
            bias=tuple(
                zip(
                    _tokens("logit_bias", list(bias), vocabulary),
                    (_number("logit_bias", value) for value in bias.values()),
                    strict=True,
                )
            ),
            sequence_bias=tuple(
                (_tokens("sequence_bias", tokens, vocabulary), float(value)) for tokens, value in sequence_bias.items()
            ),
            bad_words=tuple(_tokens("bad_words_ids", word, vocabulary) for word in config.bad_words_ids or () if word),
        )
        return None if settings == cls(vocabulary) else settings

    def of_a_class_with(self, processors: Iterable[Processor]) -> type | None:
        """The class of one of `processors`, if `generate` makes one of that class of these settings too."""
        unset = LogitsSettings(self.vocabulary)
        made = {_CLASSES[name] for name in _CLASSES if getattr(self, name) != getattr(unset, name)}
        return next((type(processor) for processor in processors if type(processor) in made), None)

    def shaping(self, prompt_length: int, total_limit: int, eos_ids: Iterable[int]) -> Shaping | None:
        """For a prompt of so many tokens and a sequence of so many at most; `None` where there is nothing to do."""
        eos_ids = set(eos_ids)
        shortest = self.min_length if self.min_new_tokens is None else prompt_length + self.min_new_tokens
        shortest = shortest if shortest > prompt_length and eos_ids else 0
        forced_first = self.forced_first if self.forced_first is not None and prompt_length == 1 else -1
        tokens: list[Listed] = []

        def rule(rule: Rule, ids: Iterable[int]) -> None:
            tokens.extend(Listed(rule, (token,)) for token in ids if 0 <= token < self.vocabulary)

        bad_words = [word for word in self.bad_words if not (len(word) == 1 and word[0] in eos_ids)]
        rule(Rule.BAN, (word[0] for word in bad_words if len(word) == 1))
        rule(Rule.BAN_WHILE_SHORT, sorted(eos_ids) if shortest else ())
        rule(Rule.FORCE_LAST, self.forced_last)
        rule(Rule.SUPPRESS, self.suppressed)
        rule(Rule.SUPPRESS_FIRST, self.suppressed_first)
        tokens += (Listed(Rule.BIAS, (token,), value) for token, value in self.bias)

        # `generate` adds the biases of a token up in this order.
        lengths = list(dict.fromkeys(len(sequence) for sequence, _ in self.sequence_bias))
        biases = [Listed(Rule.EARLY_BIAS, *pair) for pair in self.sequence_bias]
        biases.sort(key=lambda listed: (listed.tokens[-1], len(listed.tokens) > 1, lengths.index(len(listed.tokens))))
        entries = Counter(listed.tokens[-1] for listed in biases)
        alone = [listed for listed in biases if len(listed.tokens) == 1 and entries[listed.tokens[-1]] == 1]
        tokens += alone
        sequences = [listed for listed in biases if listed not in alone]
        sequences += (Listed(Rule.BAN, word, _NEVER) for word in bad_words if len(word) > 1)

        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        if penalties == (1, 0, 0) and not shortest and not self.ngram and forced_first < 0 and not tokens + sequences:
            return None
        return Shaping(
            prompt_length, *penalties, shortest, self.ngram,
            begin=prompt_length + (prompt_length == 1 and self.forced_first is not None),
            forced_first=forced_first,
            forced_last_at=total_limit - 1 if self.forced_last else -1,
            tokens=tuple(tokens),
            sequences=tuple(sequences),
        )  # fmt: skip


def _number(name: str, value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, Real) or isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _length(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 0):
        raise ValueError(f"{name} must be an integer of 0 or more, got {value!r}")
    return None if value is None else int(value)


def _tokens(name: str, value: Any, vocabulary: int | None = None) -> tuple[int, ...]:
    """Token ids as a tuple. With a `vocabulary` they must be in it."""
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        value = value.reshape(-1).tolist()
    ids = tuple(value) if isinstance(value, Iterable) else (value,)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise ValueError(f"{name} must hold integer token ids, got {token!r}")
        if vocabulary is not None and not 0 <= token < vocabulary:
            raise ValueError(f"{name}: token id {token} is outside the vocabulary, 0 to {vocabulary - 1}")
    return tuple(map(int, ids))
