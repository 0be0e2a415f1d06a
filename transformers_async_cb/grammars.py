"""Structured output: what the tokens of a request must spell, as masks of those that may come next."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase


if TYPE_CHECKING:
    import xgrammar

# Ways to say what a request's tokens must spell. As keyword arguments, each is one for all prompts or a list.
STRUCTURES = ("json_schema", "regex", "grammar")

# Bytes of compiled grammars that are kept for requests to come.
_CACHE_BYTES = 2**28


class Grammars:
    """Compiles what tokens must spell, each once, for one tokenizer, with xgrammar (https://arxiv.org/abs/2411.15100).

    Text is spelled with text: tokens that the tokenizer calls special are not part of any.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        vocabulary (`int`): tokens the model has.

    Raises:
        ImportError: xgrammar is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        xgrammar = _xgrammar()
        self._tokenizer, self._size, self._vocabulary = tokenizer, len(tokenizer), vocabulary
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary)
        self._compiler = xgrammar.GrammarCompiler(info, cache_limit_bytes=_CACHE_BYTES)
        special = {*tokenizer.all_special_ids, *info.special_token_ids, *info.stop_token_ids}
        self._text = mask_of(set(range(vocabulary)) - special, vocabulary)

    def are_of(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether these are for `tokenizer`, with the tokens that it has now."""
        return self._tokenizer is tokenizer and self._size == len(tokenizer)

    def compile(self, structure: str, source: Any) -> xgrammar.CompiledGrammar:
        """One of `STRUCTURES`. What was compiled before is found again. Safe to call from several threads.

        Raises:
            ValueError: it is not valid, or asks for something that xgrammar does not know.
        """
        compiler = self._compiler
        compiling = {
            "json_schema": compiler.compile_json_schema,
            "regex": compiler.compile_regex,
            "grammar": compiler.compile_grammar,
        }
        if structure != "json_schema" and not isinstance(source, str):
            raise ValueError(f"{structure} must be a string, got {source!r}")
        try:
            if structure == "json_schema" and (elsewhere := _reference_elsewhere(source)) is not None:
                raise ValueError(f"$ref {elsewhere!r} is not within the schema, which would let anything through")
            return compiling[structure](source)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = re.sub(r"^\[[\d:]+\] \S+?:\d+: ", "", str(error).strip())  # a time and a line of its source
            raise ValueError(f"{structure} is not valid: {reason}") from error

    def constraint(self, grammar: xgrammar.CompiledGrammar, eos_ids: Collection[int]) -> Constraint:
        """For one request, before its first token."""
        eos_ids = [token for token in eos_ids if token < self._vocabulary]
        ever = self._text.copy()
        for token in eos_ids:
            ever.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
        return Constraint(grammar, ever, eos_ids)


class Constraint:
    """Which tokens may come next in one request. Where the grammar may end, that includes its EOS ids.

    Args:
        grammar (`xgrammar.CompiledGrammar`): what its tokens spell.
        ever (`np.ndarray`): int32 `[words]`, the tokens that may ever come, as bits.
        eos_ids (`Collection[int]`): tokens that end it, and are no text here.
    """

    def __init__(self, grammar: xgrammar.CompiledGrammar, ever: np.ndarray, eos_ids: Collection[int]) -> None:
        self._grammar = grammar
        self.matcher = _xgrammar().GrammarMatcher(grammar, override_stop_tokens=list(eos_ids) or None)
        self.ever = ever
        self.mask = np.empty_like(ever)  # int32 [words]
        self.matcher.fill_next_token_bitmask(self.mask[None])
        self.mask &= ever

    def __repr__(self) -> str:
        return f"Constraint({self._grammar.grammar})"

    @property
    def ended(self) -> bool:
        """No token may come, by the mask."""
        return not self.mask.any()

    @property
    def complete(self) -> bool:
        """The tokens so far are all that the grammar asks for."""
        return self.matcher.is_completed()

    def accept(self, token: int) -> bool:
        """Take the next token; the mask has to be renewed. `False`, and nothing is changed, if it may not come."""
        return self.matcher.accept_token(token)


class MaskMaker:
    """Makes the masks of many requests at once, in threads of xgrammar's own. For one thread at a time."""

    def __init__(self) -> None:
        self._matcher = _xgrammar().BatchGrammarMatcher()

    def renew(self, constraints: Sequence[Constraint]) -> None:
        """Bring their masks up to date."""
        masks = np.empty((len(constraints), len(constraints[0].ever)), np.int32)
        self._matcher.batch_fill_next_token_bitmask([constraint.matcher for constraint in constraints], masks)
        for constraint, mask in zip(constraints, masks, strict=True):
            np.bitwise_and(mask, constraint.ever, out=constraint.mask)


def _reference_elsewhere(schema: Any) -> str | None:
    """A reference that leads out of a JSON schema: xgrammar takes it for any value."""
    left = []
    with suppress(ValueError):  # of a text that is no JSON, which xgrammar says
        left = [json.loads(schema) if isinstance(schema, str) else schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            reference = part.get("$ref")
            if isinstance(reference, str) and not reference.startswith("#"):
                return reference
            left += part.values()
        elif isinstance(part, list):
            left += part
    return None


def mask_words(vocabulary: int) -> int:
    """int32 words of a mask with a bit for each token, the lowest bit first."""
    return -(-vocabulary // 32)


def mask_of(tokens: Collection[int], vocabulary: int) -> np.ndarray:
    """The mask of some tokens: int32 `[words]`."""
    bits = np.zeros(32 * mask_words(vocabulary), bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def _xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise ImportError(
            f"{', '.join(STRUCTURES)} need xgrammar: pip install 'transformers-async-cb[structured]'"
        ) from error
    return xgrammar
