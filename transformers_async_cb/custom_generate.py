"""The engine as the decoding loop of `model.generate`: `model.generate(..., custom_generate=generate)`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import (
    ContinuousBatchingConfig,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from .config import AsyncBatchingConfig
from .entry_points import run_batch
from .manager import CACHED
from .prompts import one_by_one


# What `generate` makes of a config's settings and the engine computes itself: the attribute that holds the setting,
# and its name in the config.
_PROCESSORS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "TopHLogitsWarper": ("top_h", "top_h"),
    "TypicalLogitsWarper": ("mass", "typical_p"),
    "EpsilonLogitsWarper": ("epsilon", "epsilon_cutoff"),
    "EtaLogitsWarper": ("epsilon", "eta_cutoff"),
    "RepetitionPenaltyLogitsProcessor": ("penalty", "repetition_penalty"),
    "NoRepeatNGramLogitsProcessor": ("ngram_size", "no_repeat_ngram_size"),
    "NoBadWordsLogitsProcessor": ("bad_word_ids", "bad_words_ids"),
    "SequenceBiasLogitsProcessor": ("sequence_bias", "sequence_bias"),
    "MinLengthLogitsProcessor": ("min_length", "min_length"),
    "MinNewTokensLengthLogitsProcessor": ("min_new_tokens", "min_new_tokens"),
    "ForcedBOSTokenLogitsProcessor": ("bos_token_id", "forced_bos_token_id"),
    "ForcedEOSTokenLogitsProcessor": ("eos_token_id", "forced_eos_token_id"),
    "SuppressTokensLogitsProcessor": ("suppress_tokens", "suppress_tokens"),
    "SuppressTokensAtBeginLogitsProcessor": ("begin_suppress_tokens", "begin_suppress_tokens"),
}
# Keyword arguments of the model that `generate` prepares and the engine has no use for.
_PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def generate(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    async_batching: AsyncBatchingConfig | None = None,
    **model_kwargs: Any,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """The decoding loop of `model.generate(..., custom_generate=transformers_async_cb.generate)`: the same call with
    the same result, computed by this engine without any padding.

    Between calls the model keeps the engine, its cache included, until
    `model.destroy_cached_continuous_batching_manager()`; weights that changed are seen. Prompts may be padded on
    either side, and what is generated follows the last column. Stopping criteria are asked as `generate` asks them: of
    the whole batch after each token, with ids on the CPU and `scores=None`, on the engine's thread.

    transformers passes a function like this none of `tokenizer`, `streamer` and `synced_gpus`: give stop strings as
    `stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)]`.

    Args:
        continuous_batching_config (`ContinuousBatchingConfig`, *optional*), async_batching (`AsyncBatchingConfig`,
            *optional*): as for `generate_batch`; keyword arguments of `model.generate` like all others.

    Returns:
        Token ids `[B, T + new]`, or a `GenerateDecoderOnlyOutput` that holds them if `return_dict_in_generate` is set.

    Raises:
        ValueError: the model, a setting or an argument is not supported; the message names it.
        RuntimeError: a prompt could not be finished; the message says why.
    """
    _refuse_processors(logits_processor, generation_config)
    mask = model_kwargs.get("attention_mask")
    _refuse_inputs(model_kwargs, mask)
    width, limit = input_ids.shape[1], stopping_criteria.max_length - input_ids.shape[1]
    on_cpu = input_ids.cpu()
    prompts = one_by_one(on_cpu, mask)
    eos: list[int] = []
    max_time, others = None, StoppingCriteriaList()
    for criterion in stopping_criteria:
        if type(criterion) is EosTokenCriteria:
            eos += criterion.eos_token_id.tolist()
        elif type(criterion) is MaxTimeCriteria:
            max_time = criterion.max_time
        elif type(criterion) is not MaxLengthCriteria:
            others.append(criterion)
    pad = generation_config.pad_token_id if generation_config.pad_token_id is not None else (eos or [0])[0]

    settings: dict[str, Any] = {"max_new_tokens": limit, "eos_token_id": eos, "max_time": max_time}
    own: list[dict[str, Any]] = [{} for _ in prompts]
    if generation_config.do_sample:  # the rows of a batch differ, and follow `torch.manual_seed`
        for row, seed in zip(own, torch.randint(2**62, (len(prompts),), device="cpu").tolist(), strict=True):
            row["seed"] = seed
    if width > 1 and generation_config.forced_bos_token_id is not None:  # for a length of 1, padding included
        settings["forced_bos_token_id"] = None
    if generation_config.min_length:  # which counts padding
        for row, prompt in zip(own, prompts, strict=True):
            row["min_length"] = max(0, generation_config.min_length - width + len(prompt))
    together = Together(others, on_cpu, [len(prompt) for prompt in prompts], limit, eos, pad) if others else None
    if together is not None:
        for i, row in enumerate(own):
            row["stopping_criteria"] = [together.of_row(i)]

    config = copy.deepcopy(generation_config)  # `generate` has repeated the prompts, and made criteria of the rest
    config.num_return_sequences, config.stop_strings, config.max_time = 1, None, None
    kept = getattr(model, CACHED, None)
    init = {
        "generation_config": config,
        "continuous_batching_config": continuous_batching_config,
        "async_batching": async_batching or (kept.async_config if kept is not None else AsyncBatchingConfig()),
    }
    request_ids, results = run_batch(model, prompts, init, settings, own, keep=True)
    outputs = {output.request_id: output for output in results}
    if together is not None and together.error is not None:
        raise together.error
    rows = []
    for i, output in enumerate(outputs[request_id] for request_id in request_ids):
        if output.error is not None:
            raise RuntimeError(f"row {i}: {output.error}")
        rows.append(output.generated_tokens if together is None else output.generated_tokens[: together.ends[i]])
    longest = max(map(len, rows))
    new = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=input_ids.dtype)
    sequences = torch.cat([input_ids, new.to(input_ids.device)], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


class Together:
    """Asks stopping criteria of a whole batch after each token, as `generate` does, while its rows are generated each
    in their own time.

    A row may be ahead of the others; what it has beyond the token at which the criteria ended it is left out. As in
    `generate`, a row ends alone only where there is an EOS; without one all go on until each has been ended.

    Args:
        criteria (`StoppingCriteriaList`): all but those of lengths, times and EOS.
        input_ids (`torch.LongTensor`): `[B, T]` on the CPU, padding included.
        lengths (`list[int]`): of the prompts without padding.
        limit (`int`): new tokens of a row, at most.
        eos (`list[int]`), pad (`int`): token ids.

    Attributes:
        ends (`np.ndarray`): how many new tokens each row has, int64 `[B]`.
        error (`Exception`, *optional*): what a criterion raised.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        input_ids: torch.LongTensor,
        lengths: list[int],
        limit: int,
        eos: list[int],
        pad: int,
    ) -> None:
        count, self._width = input_ids.shape
        self._criteria = criteria
        self._lengths = lengths
        self._eos = frozenset(eos)
        self._pad = pad
        self._ids = torch.full((count, self._width + limit), pad)
        self._ids[:, : self._width] = input_ids
        self._known = np.zeros(count, np.int64)  # new tokens
        self._unfinished = np.ones(count, bool)
        self._step = 0  # the last that the criteria were asked about
        self.ends = np.full(count, limit, np.int64)
        self.error: Exception | None = None

    def of_row(self, row: int) -> Callable[[torch.LongTensor, None], bool]:
        """A criterion for the request of one row."""

        def ended(ids: torch.LongTensor, scores: None) -> bool:
            number = ids.shape[1] - self._lengths[row]
            self._take(row, number, int(ids[0, -1]))
            return self.error is not None or number >= self.ends[row]

        return ended

    def _take(self, row: int, number: int, token: int) -> None:
        if self.error is not None or number > self.ends[row]:
            return
        self._ids[row, self._width + number - 1] = token
        self._known[row] = number
        if token in self._eos:
            self.ends[row] = number
        while (
            self._unfinished.any()
            and (np.minimum(self._known, self.ends) >= np.minimum(self._step + 1, self.ends)).all()
        ):
            if self._step == self.ends.max():
                return
            self._step += 1
            try:
                done = self._criteria(self._ids[:, : self._width + self._step], None).numpy()
            except Exception as error:
                self.error = error
                return
            self._unfinished &= ~done & (self.ends > self._step)
            self._end()

    def _end(self) -> None:
        """Note which rows end with this step."""
        if not self._unfinished.any():
            self.ends = np.minimum(self.ends, self._step)
        elif self._eos:
            for row in np.flatnonzero(~self._unfinished & (self.ends > self._step)):
                self.ends[row] = self._step
                self._ids[row, self._width + self._step :] = self._pad


def _refuse_processors(processors: LogitsProcessorList, config: GenerationConfig) -> None:
    """Raises `ValueError` for a processor that is not the config's own."""
    seen = set()
    for processor in processors:
        name = type(processor).__name__
        if name == "LogitNormalization":  # changes no token
            continue
        attribute, setting = _PROCESSORS.get(name, ("", ""))
        if not setting or not type(processor).__module__.startswith("transformers."):
            raise ValueError(f"the logits processor {name} is not supported with this custom_generate")
        if name in seen or _plain(getattr(processor, attribute)) != _plain(getattr(config, setting)):
            raise ValueError(
                f"a {name} given as logits_processor is not supported with this custom_generate: set {setting} instead"
            )
        seen.add(name)


def _plain(setting: Any) -> Any:
    """A setting as lists of numbers in single precision, for processors keep what configs have in other forms; one
    token as a list of one."""
    if isinstance(setting, torch.Tensor):
        setting = setting.tolist()
    if isinstance(setting, Mapping):
        setting = setting.items()
    if isinstance(setting, Iterable):
        return [_plain(part)[0] if isinstance(part, int) else _plain(part) for part in setting]
    return [float(np.float32(setting)) if isinstance(setting, float) else setting]


def _refuse_inputs(model_kwargs: dict[str, Any], mask: torch.Tensor | None) -> None:
    """Raises `ValueError` for what the engine would not pass on to the model."""
    unknown = sorted(name for name, value in model_kwargs.items() if name not in _PREPARED and value is not None)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: this custom_generate passes the model token ids alone")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values that hold something are not supported with this custom_generate")
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        if mask is None:
            mask = torch.ones_like(positions)
        if positions.shape != mask.shape or not torch.equal(
            positions[mask == 1], (mask.cumsum(-1) - 1)[mask == 1].to(positions.dtype)
        ):
            raise ValueError("position_ids of your own are not supported with this custom_generate")
