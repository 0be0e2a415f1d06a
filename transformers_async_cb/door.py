"""Everything a user gives for a request is checked here, before anything runs."""

from __future__ import annotations

import copy
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .grammars import STRUCTURES, Constraint, Grammars
from .logits import Processor, Processors, Shaping
from .logprobs import PromptScores, no_words
from .model import ModelLoan
from .model_inputs import ModelInputs, has_own_generate, input_names
from .prompts import Prompt, encode
from .request import Family, Request, Sampling
from .settings import (
    GenerationSettings,
    check_likeliest,
    check_logits_processor,
    check_max_new_tokens,
    check_priority,
    check_seconds,
    check_stop_strings,
    check_stopping_criteria,
    eos_ids,
    resolve_generation,
)
from .stop_strings import StopStrings, TokenTexts


if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

logger = logging.get_logger(f"transformers.{__name__}")


_FOR_EACH = (
    "inputs of the model are given for each request, in a dictionary of request_settings=[...] or to add_request"
)


def sequence_id(request_id: str, number: int) -> str:
    """The id of a request's sequence, by its number: the first has the request's own, others transformers' names."""
    return f"{request_id}__child#{number - 1}" if number else request_id


def sequence_seed(seed: int, number: int) -> int:
    """The seed with which a request of one sequence gets what sequence `number` of a request with `seed` gets."""
    if not number:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=7).digest(), "little")


class Door:
    """Turns what users give into requests, or says what is wrong with it.

    Called with the manager's lock held, but for `compile`, which may take long. The loop takes what has ended out of
    `live`, and must not wait for a long check.

    Args:
        loan (`ModelLoan`): the model.
        seed (`int`, *optional*): from which each request's own is derived, with its id. Otherwise it is drawn when a
            request first needs one, so that it follows `torch.manual_seed` and greedy decoding leaves that alone.
    """

    def __init__(self, loan: ModelLoan, seed: int | None) -> None:
        self._loan = loan
        self._model = loan.model
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._criteria: tuple[Callable, ...] = ()
        self._processors: tuple[Processor, ...] = ()
        self._grammars: Grammars | None = None  # of the tokenizer that a grammar needed last
        self._texts: TokenTexts | None = None  # of the tokenizer that stop strings needed last
        self._vocabulary = loan.vocabulary
        self._encodes = self._model.config.is_encoder_decoder
        self._input_names = input_names(self._model)
        self._position_limit, self._limited_to = loan.position_limit()
        self._stated_positions = loan.stated_positions
        self._seed = seed
        self._counter = 0
        self._arrivals = 0
        self.live: dict[str, Request] = {}  # let in, and without a final result

    def configure(
        self,
        config: GenerationConfig | None,
        overrides: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase | None,
        stopping_criteria: list[Callable] | None,
        logits_processor: list[Processor] | None,
    ) -> None:
        """Take the settings of the requests that are checked from now on, or none of them if one is not valid.

        Raises:
            ValueError: see `resolve_generation`.
        """
        if given := sorted(self._input_names.intersection(overrides)):
            raise ValueError(f"{', '.join(given)}: {_FOR_EACH}")
        generation = resolve_generation(self._model, config, overrides)
        criteria = check_stopping_criteria(stopping_criteria, "the call")
        processors = check_logits_processor(logits_processor, "the call")
        self._stop_strings("generation_config", generation.stop_strings, tokenizer)
        self._generation, self._tokenizer = generation, tokenizer
        self._criteria, self._processors = criteria, processors
        self._config, self._overrides = copy.deepcopy(config), copy.deepcopy(overrides)

    @property
    def given(self) -> set[str]:
        """Names of what live requests give the model beside token ids."""
        inputs = (request.inputs for request in list(self.live.values()))
        return {name for each in inputs if each is not None for name in each.names}

    @property
    def sampling(self) -> Sampling:
        """How requests without settings of their own pick their tokens, all but the seed."""
        return self._generation.sampling

    def names(self, count: int) -> list[str]:
        """Ids for requests that came without one: `req_0`, `req_1`, ... They count as given out once admitted."""
        names, counter = [], self._counter
        while len(names) < count:
            if (name := f"req_{counter}") not in self.live:
                names.append(name)
            counter += 1
        return names

    def compile(self, **structures: Any) -> None:
        """Compile what `check` will be given as `STRUCTURES`, which finds it done then, or says what is not valid."""
        for structure, sources in structures.items():
            for source in sources if isinstance(sources, (list, tuple)) else (sources,):
                if source is not None and self._tokenizer is not None:
                    with suppress(ValueError):
                        self._grammars_of(self._tokenizer).compile(structure, source)

    def check(
        self,
        request_ids: Iterable[str],
        inputs: Sequence[Prompt],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        stop_strings: str | list[str] | None = None,
        max_time: float | None = None,
        stopping_criteria: list[Callable] | None = None,
        logits_processor: list[Processor] | None = None,
        json_schema: Any = None,
        regex: Any = None,
        grammar: Any = None,
        stop_in_answer: bool = False,
        generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        seed: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        **per_request: Any,
    ) -> list[Request]:
        """The requests, of which none is let in yet. `generation_config` is one for all, or a sequence of as many, and
        so are `json_schema`, `regex` and `grammar`.

        Raises:
            ValueError: one is not valid; the message names the request and what is allowed.
        """
        if not isinstance(generation_config, Sequence):
            generation_config = itertools.repeat(generation_config, len(inputs))
        elif len(generation_config) != len(inputs):
            raise ValueError(
                f"there are {len(generation_config)} generation configs for {len(inputs)} prompts: give one for each, "
                "or one for all"
            )
        requests, now = [], time.perf_counter()
        values = {key: per_request.pop(key) for key in self._input_names.intersection(per_request)}
        if values and len(inputs) > 1:
            raise ValueError(f"{', '.join(sorted(values))}: {_FOR_EACH}")
        resolved: dict[int, GenerationSettings] = {}
        compiled: dict[tuple[str, int], CompiledGrammar] = {}
        structures = _structures(len(inputs), (json_schema, regex, grammar))
        for request_id, input_ids, config, asked in zip(
            request_ids, inputs, generation_config, structures, strict=True
        ):
            name = f"request {request_id}"
            if (settings := resolved.get(id(config))) is None:
                settings = resolved[id(config)] = self._resolve(name, config, per_request)
            ids = [sequence_id(request_id, number) for number in range(settings.sequences)]
            if (taken := next((i for i in ids if i in self.live), None)) is not None:
                raise ValueError(f"{name}: the id {taken} is in use, choose another or wait for its result")
            tokens = self._prompt(name, input_ids)
            model_inputs = None
            if self._encodes:
                tokens, model_inputs = self._decoder_prompt(name, tokens, dict(values), settings)
            elif values:
                model_inputs = ModelInputs(values)
            if values and has_own_generate(self._model):
                raise ValueError(
                    f"{name}: {', '.join(sorted(values))}: {type(self._model).__name__} has a generate of its own, "
                    "which async_batching does not call"
                )
            if values and self._loan.out and self._loan.batched:
                raise ValueError(
                    f"{name}: {', '.join(sorted(values))}: the manager batches token ids alone; add the request "
                    "before it is started or warmed up, or start one with AsyncBatchingConfig(one_at_a_time=True)"
                )
            if max_new_tokens is None:
                limit = settings.new_tokens(len(tokens), self._stated_positions, name)
            else:
                check_max_new_tokens(max_new_tokens, name)
                limit = max_new_tokens
            strings = settings.stop_strings if stop_strings is None else check_stop_strings(stop_strings, name)
            if stopping_criteria is None:
                criteria = self._criteria
            else:
                criteria = check_stopping_criteria(stopping_criteria, name)
            if logits_processor is None:
                processors = self._processors
            else:
                processors = check_logits_processor(logits_processor, name)
            eos = settings.eos_ids if eos_token_id is None else eos_ids(eos_token_id, name)
            likeliest = check_likeliest(logprobs, self._vocabulary, "logprobs", name)
            if prompt_logprobs is not None and self._encodes:
                raise ValueError(f"{name}: prompt_logprobs: an encoder reads the prompt, nothing is generated from it")
            of_prompt = check_likeliest(prompt_logprobs, self._vocabulary, "prompt_logprobs", name)
            family = Family() if settings.sequences > 1 else None
            request = Request(
                id=request_id,
                tokens=tokens,
                prompt_length=len(tokens),
                max_new_tokens=limit,
                sampling=self._sampling(request_id, settings.sampling, seed),
                eos_ids=eos,
                stop_strings=self._stop_strings(
                    name, strings, self._tokenizer, first=len(tokens) if stop_in_answer else 0
                ),
                max_time=settings.max_time if max_time is None else check_seconds(max_time, "max_time", name),
                stopping_criteria=criteria,
                shaping=self._shaping(name, settings, len(tokens), limit, eos, processors),
                processors=Processors(name, processors, self._loan.device) if processors else None,
                inputs=model_inputs,
                constraint=self._constraint(name, asked, eos, compiled),
                ranked=None if likeliest is None else no_words(0, likeliest),
                prompt_scores=None if of_prompt is None else PromptScores(no_words(len(tokens) - 1, of_prompt)),
                streaming=streaming,
                record_timestamps=record_timestamps,
                family=family,
                priority=check_priority(priority, name),
                deadline=now + check_seconds(deadline, "deadline", name),
                created_time=now,
                arrival=self._arrivals + len(requests),
            )
            requests.append(request)
            for number, child in enumerate(ids[1:], 1):
                own = None if seed is None else sequence_seed(seed, number)
                sampling = self._sampling(child, settings.sampling, own)
                sequence = replace(
                    request, id=child, sampling=sampling, arrival=self._arrivals + len(requests), page_keys=[]
                )
                if processors:
                    sequence.processors = Processors(f"request {child}", processors, self._loan.device)
                sequence.inputs = copy.copy(model_inputs)  # whose values are nobody's to change
                sequence.constraint = self._constraint(f"request {child}", asked, eos, compiled)
                requests.append(sequence)
            if family is not None:
                family.members += requests[-len(ids) :]
        return requests

    def let_in(self, requests: list[Request]) -> None:
        """From now on their ids are in use."""
        self._arrivals += len(requests)
        self.live.update({request.id: request for request in requests})  # at once, for who cancels meanwhile
        while f"req_{self._counter}" in self.live:
            self._counter += 1

    def sequences(self, request_id: str) -> list[Request]:
        """The sequences of the request of that id, or the one sequence of that id, that have not ended."""
        request = self.live.get(request_id)
        if request is not None:
            members = [request] if request.family is None else request.family.members
            return [request] if members[0] is not request else [m for m in members if self.live.get(m.id) is m]
        # The first may have ended before the others.
        return [r for r in list(self.live.values()) if r.family is not None and r.family.members[0].id == request_id]

    def let_out(self, request_ids: Iterable[str]) -> None:
        """Their ids may be used again."""
        for request_id in request_ids:
            self.live.pop(request_id, None)

    def _decoder_prompt(
        self, name: str, encoder_ids: np.ndarray, values: dict[str, Any], settings: GenerationSettings
    ) -> tuple[np.ndarray, ModelInputs]:
        """What the decoder of an encoder-decoder begins with in `generate`, int32 `[n]`; and the model's inputs."""
        start = settings.decoder_start
        if not isinstance(start, Integral):
            raise ValueError(
                f"{name}: {type(self._model).__name__} needs a decoder_start_token_id or a bos_token_id in its "
                f"generation config, one token, got {start!r}"
            )
        tokens = np.array([start], np.int32)
        if (given := values.pop("decoder_input_ids", None)) is not None:
            given = self._prompt(name, given[0] if np.ndim(given) == 2 and len(given) == 1 else given)
            tokens = given if given[0] == start else np.concatenate([tokens, given])
        return tokens, ModelInputs(values, encoder_ids)

    def _resolve(self, name: str, config: GenerationConfig | None, per_request: dict[str, Any]) -> GenerationSettings:
        """The settings of a request that has a config, or keyword arguments, of its own."""
        if config is None and not per_request:
            return self._generation
        if config is not None and not isinstance(config, GenerationConfig):
            raise ValueError(f"{name}: generation_config must be a GenerationConfig, not {type(config).__name__}")
        if config is None:
            config, per_request = self._config, self._overrides | per_request
        try:
            return resolve_generation(self._model, config, per_request)
        except (ValueError, TypeError) as error:  # which transformers raises where it compares with a number
            raise ValueError(f"{name}: {error}") from error

    def _sampling(self, request_id: str, sampling: Sampling, seed: int | None) -> Sampling:
        """With the seed: from the request's own alone, or from everybody's and the request's id."""
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise ValueError(f"request {request_id}: seed must be an integer, got {seed!r}")
        if not sampling.temperature:
            return sampling
        if seed is None and self._seed is None:
            self._seed = int(torch.randint(2**62, (), device="cpu"))
        origin = f"{self._seed}:{request_id}" if seed is None else str(seed)
        digest = hashlib.blake2b(origin.encode(), digest_size=8).digest()
        return sampling._replace(seed=int.from_bytes(digest, "little"))

    @staticmethod
    def _shaping(
        name: str,
        settings: GenerationSettings,
        prompt_length: int,
        limit: int,
        eos: tuple[int, ...],
        processors: tuple[Processor, ...],
    ) -> np.ndarray | None:
        """With processors there is one in any case: tokens are kept on the device where there is."""
        shaping = settings.logits and settings.logits.shaping(prompt_length, prompt_length + limit, eos)
        if processors:
            logger.warning_once(
                "logits processors of your own run on a thread of the engine's: a step with such a request is not "
                "captured, and if a processor waits for the device, so do all requests"
            )
            twice = settings.logits and settings.logits.of_a_class_with(processors)
            if twice:
                raise ValueError(
                    f"{name}: logits_processor has a {twice.__name__}, and the generation settings ask for one too: "
                    "give it once"
                )
            shaping = shaping or Shaping(prompt_length)
        try:
            return None if shaping is None else shaping.words()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _stop_strings(
        self, name: str, strings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase | None, first: int = 0
    ) -> StopStrings | None:
        if not strings:
            return None
        if tokenizer is None:
            raise ValueError(
                f"{name}: stop_strings need the model's tokenizer: give it with the call or the manager, tokenizer=..."
            )
        if self._texts is None or not self._texts.are_of(tokenizer):
            if any(request.stop_strings is not None for request in list(self.live.values())):
                raise ValueError(
                    f"{name}: requests with stop strings of another tokenizer have not ended, wait for their results"
                )
            self._texts = TokenTexts(tokenizer)
        return StopStrings(strings, self._texts, first)

    def _constraint(
        self,
        name: str,
        asked: list[tuple[str, Any]],
        eos: tuple[int, ...],
        compiled: dict[tuple[str, int], CompiledGrammar],
    ) -> Constraint | None:
        if not asked:
            return None
        if len(asked) > 1:
            given = " and ".join(structure for structure, _ in asked)
            raise ValueError(f"{name}: {given} are given, but tokens can spell one thing only")
        ((structure, source),) = asked
        if self._tokenizer is None:
            raise ValueError(
                f"{name}: {structure} needs the model's tokenizer: give it with the call or the manager, tokenizer=..."
            )
        try:
            grammars = self._grammars_of(self._tokenizer)
            if (grammar := compiled.get((structure, id(source)))) is None:
                grammar = compiled[structure, id(source)] = grammars.compile(structure, source)
            constraint = grammars.constraint(grammar, eos)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if constraint.ended:
            raise ValueError(f"{name}: no token of the vocabulary begins what its {structure} asks for")
        return constraint

    def _grammars_of(self, tokenizer: PreTrainedTokenizerBase) -> Grammars:
        grammars = self._grammars
        if grammars is None or not grammars.are_of(tokenizer):
            grammars = self._grammars = Grammars(tokenizer, self._vocabulary)
        return grammars

    def _prompt(self, name: str, prompt: Prompt) -> np.ndarray:
        """The prompt as int32 `[tokens]`."""
        input_ids = encode(name, prompt, self._tokenizer)
        if isinstance(input_ids, torch.Tensor):
            if input_ids.is_floating_point():
                raise ValueError(f"{name}: the prompt must hold integer token ids, not {input_ids.dtype}")
            input_ids = input_ids.cpu()
        try:
            tokens = np.asarray(input_ids)
        except ValueError:  # ragged
            tokens = np.empty((0, 0))
        if tokens.ndim != 1:
            raise ValueError(f"{name}: the prompt must be one flat sequence of token ids")
        if not len(tokens):
            raise ValueError(f"{name}: the prompt is empty, it needs at least one token id")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"{name}: the prompt must hold integer token ids, not {tokens.dtype}")
        if tokens.min() < 0 or tokens.max() >= self._vocabulary:
            wrong = tokens[(tokens < 0) | (tokens >= self._vocabulary)][0]
            raise ValueError(f"{name}: token id {wrong} is outside the vocabulary, 0 to {self._vocabulary - 1}")
        if self._position_limit is not None and len(tokens) > self._position_limit:
            raise ValueError(
                f"{name}: the prompt has {len(tokens)} tokens, more than the {self._position_limit} {self._limited_to}"
            )
        return tokens.astype(np.int32)


def _structures(count: int, given: Sequence[Any]) -> list[list[tuple[str, Any]]]:
    """What was given as `STRUCTURES`, by prompt: pairs of which, and what.

    Raises:
        ValueError: there is a list of another length.
    """
    asked: list[list[tuple[str, Any]]] = [[] for _ in range(count)]
    for structure, value in zip(STRUCTURES, given, strict=True):
        sources = value if isinstance(value, (list, tuple)) else [value] * count
        if len(sources) != count:
            raise ValueError(
                f"{structure} is a list of {len(sources)} for {count} prompts: give one for each, or one for all"
            )
        for i, source in enumerate(sources):
            if source is not None:
                asked[i].append((structure, source))
    return asked
