"""Models that cannot be run on pages: one sequence at a time, each with a cache of its own, as in `generate`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from .attention import LayerShape, Place
from .config import AsyncBatchingConfig
from .inputs import Bucket, StepArrays
from .model import CLOSE, CLOSE_ROUNDED, ModelLoan, difference, trial
from .model_inputs import ModelInputs
from .request import Rows
from .runner import Runner
from .sampling import Flavour
from .scheduler import Plan
from .settings import EngineSettings, Mode, Workload, resolve_engine


# Requests that run at the same time, at most. More would make each step longer, and none of them faster.
MOST_ROWS = 16
# Positions of one request, at most, where the workload is not known to have longer ones.
MOST_POSITIONS = 2**17
# Lengths, in tokens, at which the bytes of a sequence are measured.
_SHORT, _LONG = 16, 32

# What a model is tried out with.
_TRIED = "one sequence, as in generate,"


class Sequence:
    """One sequence, token by token: what `generate` does between two samples.

    Args:
        model (`PreTrainedModel`): it runs.
        kwargs (`dict`): what `generate` gives it beside the ids, cache included; the sequence's own.
    """

    def __init__(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        self._model = model
        self.kwargs = kwargs
        self._ids: torch.Tensor | None = None

    def advance(self, ids: torch.Tensor, every: bool = False) -> torch.Tensor:
        """Logits `[1, V]` after `ids` `[1, n]`, or `[n, V]` after `every` one of them. They are the prompt at first,
        then the token sampled last."""
        if self._ids is None:
            self._ids = ids
            position = {"is_first_iteration": True, "next_sequence_length": None}
        else:
            self._ids = torch.cat([self._ids, ids], dim=1)
            position = {"next_sequence_length": 1 if self.kwargs.get("use_cache") else None}
        inputs = self._model.prepare_inputs_for_generation(self._ids, **position, **self.kwargs)
        if every and "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0
        outputs = self._model(**inputs, return_dict=True)
        # The hook that models override, which loops given as `custom_generate` call too.
        self.kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self._model.config.is_encoder_decoder
        )
        return outputs.logits[0] if every else outputs.logits[:, -1]

    @property
    def bytes(self) -> int:
        """Of all tensors that it keeps."""
        return sum(tensor.nbytes for tensor in tensors_of(self.kwargs))


class Opening:
    """How `generate` begins a sequence of the model, noted once; and what a sequence takes, once that was tried.

    Args:
        loan (`ModelLoan`): the model, borrowed as it is.

    Raises:
        ValueError: a sequence cannot be begun from tokens alone.
    """

    def __init__(self, loan: ModelLoan) -> None:
        self._loan = loan
        self._model = loan.model
        self.kept_per_token = self.bytes_per_sequence = 0
        self._kwargs: dict[str, Any] = {}
        self._logits = torch.empty(0)  # some
        if not self._model.config.is_encoder_decoder:
            with trial(self._model, _TRIED, ValueError):
                self._kwargs = self._of_tokens_alone()

    def begin(self, length: int) -> Sequence:
        """A sequence whose first `length` tokens come at once."""
        kwargs = copy.deepcopy(self._kwargs)
        if (positions := kwargs.get("position_ids")) is not None:
            steps = torch.arange(length, device=positions.device)
            kwargs["position_ids"] = steps.expand(*positions.shape[:-1], length)
        if (mask := kwargs.get("attention_mask")) is not None:
            kwargs["attention_mask"] = mask.new_ones(1, length)
        return Sequence(self._model, kwargs)

    def begin_with(self, inputs: ModelInputs, ids: torch.Tensor) -> Sequence:
        """A sequence with inputs of its own, as `generate` prepares it: an encoder runs here.

        Args:
            ids (`torch.Tensor`): `[1, n]`, what the sequence begins with.
        """
        given = inputs.on(self._loan.device)
        if inputs.encoder_ids is not None:
            begun_with, kwargs = self._prepared(given | {"decoder_input_ids": ids}, decoder_start=int(ids[0, 0]))
        else:
            given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            begun_with, kwargs = self._prepared(given)
        if not torch.equal(begun_with, ids):
            raise NotImplementedError(f"generate begins with other tokens: {begun_with.tolist()}")
        return Sequence(self._model, kwargs)

    def try_out(self) -> None:
        """Measure a sequence, and see that two that take turns get the logits that each gets alone.

        Raises:
            ValueError: they do not.
        """
        token = _some_tokens(1, self._loan)
        with trial(self._model, _TRIED, ValueError):
            alone, ids = self._some_sequence(_SHORT)
            expected = [alone.advance(each) for each in (ids, token, token)]
            one, ids = self._some_sequence(_SHORT)
            other, other_ids = self._some_sequence(_LONG)
            found = [one.advance(ids)]
            other.advance(other_ids)
            sizes = one.bytes, other.bytes
            for _ in range(2):
                found.append(one.advance(token))
                other.advance(token)
            for logits, alone_logits in zip(found, expected, strict=True):
                if difference(logits, alone_logits) > (CLOSE_ROUNDED if self._loan.rounds else CLOSE):
                    raise NotImplementedError(
                        "it keeps something of a sequence outside of its cache, where another sequence changes it"
                    )
        self._logits = found[0]
        self.kept_per_token = max(1, (sizes[1] - sizes[0]) // (_LONG - _SHORT))
        self.bytes_per_sequence = max(0, sizes[0] - self.kept_per_token * _SHORT)

    def no_logits(self, count: int) -> torch.Tensor:
        """`[count, V]` in the place of those of a sequence that failed."""
        return self._logits.new_zeros(count, self._logits.shape[-1])

    def _some_sequence(self, length: int) -> tuple[Sequence, torch.Tensor]:
        """A sequence that begins with so many tokens, or whose encoder reads so many; and what it begins with."""
        ids = _some_tokens(length, self._loan)
        if not self._model.config.is_encoder_decoder:
            return self.begin(length), ids
        return self.begin_with(ModelInputs({}, ids[0].cpu().numpy()), ids[:, :1]), ids[:, :1]

    def _of_tokens_alone(self) -> dict[str, Any]:
        """What `generate` gives the model beside the ids: an empty cache, positions, flags.

        Raises:
            NotImplementedError: there is more than can be prepared anew for other tokens.
        """
        ids = _some_tokens(_SHORT, self._loan)
        _, begun = self._prepared({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        tensors = {name for name, value in begun.items() if isinstance(value, torch.Tensor)}
        if unknown := sorted(tensors - {"position_ids", "attention_mask"}):
            raise NotImplementedError(f"generate prepares {', '.join(unknown)} for it")
        return begun

    def _prepared(
        self, given: dict[str, Any], decoder_start: int | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The ids with which `generate` enters its loop when it is `given` these keyword arguments, and what it gives
        the model beside them."""
        begun: dict[str, Any] = {}

        def note(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            begun.update(kwargs)
            return input_ids

        model = self._model
        kind = None if model.generation_config.cache_implementation is None else "dynamic"
        config = GenerationConfig(
            max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=0, cache_implementation=kind,
            decoder_start_token_id=decoder_start,
        )  # fmt: skip
        ids = model.generate(**given, generation_config=config, custom_generate=note)
        for of_the_loop in ("logits_processor", "stopping_criteria", "generation_config"):
            begun.pop(of_the_loop)
        return ids, begun


def _some_tokens(count: int, loan: ModelLoan) -> torch.Tensor:
    """Token ids `[1, count]`; the first two are often for padding, and left out if there are others."""
    return (torch.arange(count, device=loan.device)[None] % 2 + 2) % loan.vocabulary


def tensors_of(value: object, seen: set[int] | None = None) -> Iterable[torch.Tensor]:
    """All tensors within, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
        yield from tensors_of(vars(value), seen)


def resolve_sequential(
    loan: ModelLoan,
    opening: Opening,
    batching: ContinuousBatchingConfig,
    own: AsyncBatchingConfig,
    workload: Workload,
) -> EngineSettings:
    """As `resolve_engine`, for an engine that runs one sequence at a time. Pages are not storage here: they count the
    tokens that the sequences' caches hold. A prompt is computed in one piece, whatever `max_batch_tokens` says."""
    kept = LayerShape(1, opening.kept_per_token, 0, torch.uint8)
    settings = resolve_engine(loan, {Place(loan.model, 0): kept}, batching, own, workload)
    rows = min(MOST_ROWS, settings.rows)
    if batching.num_blocks is None:  # what sequences take whatever their length comes out of the same memory
        page_bytes = settings.page_size * opening.kept_per_token
        memory = settings.page_limit * page_bytes
        rows = max(1, min(rows, memory // 2 // max(1, opening.bytes_per_sequence)))
        page_limit = max(1, (memory - rows * opening.bytes_per_sequence) // page_bytes)
        settings = settings._replace(page_limit=page_limit, pages=min(settings.pages, page_limit))
    longest = max(min(loan.stated_positions or MOST_POSITIONS, MOST_POSITIONS), workload.longest)
    columns = min(settings.columns, -(-longest // settings.page_size))
    return settings._replace(
        layout=settings.layout._replace(slots=()),
        pages=min(settings.pages, rows * columns),
        page_limit=min(settings.page_limit, rows * columns),
        rows=rows,
        row_limit=rows,
        columns=columns,
        max_tokens=min(settings.max_tokens, columns * settings.page_size),
        token_budget=columns * settings.page_size + rows,
        fused=False,
        compiled=False,
        graphs=False,
        reuse=False,
        host_pages=0,
        mode=Mode.SEQUENCES,
        whole_prompts=settings.token_budget,
    )


class Beginning(NamedTuple):
    """What a sequence begins with, beside its tokens."""

    inputs: ModelInputs | None
    prompt_length: int


class SequentialKey(NamedTuple):
    """One step, as `SequentialRunner` needs it: nothing of it is made for another."""

    bucket: Bucket
    flavour: Flavour
    rows: tuple[int, ...]
    counts: tuple[int, ...]  # tokens of each
    fresh: tuple[tuple[int, Beginning], ...]  # rows that begin
    free: tuple[int, ...]  # rows that nobody has


class SequentialRunner(Runner):
    """Runs plans one sequence after another. What a sequence keeps is dropped when its request has given up its row,
    so a preempted request is computed again, as with pages.

    Args:
        loan (`ModelLoan`): the model, borrowed as it is.
        opening (`Opening`): how its sequences begin.
        rows (`Rows`): the running requests.
        settings (`EngineSettings`): every size.
    """

    def __init__(self, loan: ModelLoan, opening: Opening, rows: Rows, settings: EngineSettings) -> None:
        super().__init__(loan, {}, rows, settings)
        self.pads = False
        self._opening = opening
        self._sequences: dict[int, Sequence] = {}  # by row, as are the next; the compute lane's
        self._inputs: dict[int, ModelInputs | None] = {}

    def key_for(self, plan: Plan) -> SequentialKey:
        free = tuple(row for row, request in enumerate(self.rows.request) if request is None)
        bucket = Bucket(plan.tokens, len(plan.rows), plan.decodes == len(plan.rows))
        rows, counts = tuple(plan.rows.tolist()), tuple(plan.counts.tolist())
        requests = [self.rows.request[row] for row in plan.fresh]
        fresh = tuple((row, Beginning(r.inputs, r.prompt_length)) for row, r in zip(plan.fresh, requests, strict=True))
        return SequentialKey(bucket, self.flavour(plan), rows, counts, fresh, free)

    def rest(self) -> None:
        self._sequences.clear()
        self._inputs.clear()

    def release_pages(self) -> None:
        self._sequences.clear()
        self._inputs.clear()
        super().release_pages()

    def _forward(
        self, key: SequentialKey, a: StepArrays, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        for row in key.free:
            self._sequences.pop(row, None)
            self._inputs.pop(row, None)
        fresh = dict(key.fresh)
        logits, at, every = [], 0, key.flavour.scored > 0
        for row, count in zip(key.rows, key.counts, strict=True):
            with self.loan.autocasting():
                logits.append(self._advance(row, fresh.get(row), ids[None, at : at + count], every))
            at += count
        found = torch.cat(logits).to(self.device)  # a model may end on another device than it begins
        return found[keep] if every else found

    def _advance(self, row: int, beginning: Beginning | None, ids: torch.Tensor, every: bool) -> torch.Tensor:
        """What `Sequence.advance` returns for a row. What its own inputs make fail ends its request alone."""
        if beginning is not None:
            self._inputs[row] = beginning.inputs
        inputs = self._inputs[row]
        if inputs is None:
            if beginning is not None:
                self._sequences[row] = self._opening.begin(ids.shape[1])
            return self._sequences[row].advance(ids, every)
        count = ids.shape[1] if every else 1
        if inputs.error is None:
            try:
                pieces = [ids]
                if beginning is not None:
                    length = beginning.prompt_length
                    self._sequences[row] = self._opening.begin_with(inputs, ids[:, :length])
                    # There is more than the prompt if the request was preempted.
                    pieces = [ids[:, :length], *(ids[:, at : at + 1] for at in range(length, ids.shape[1]))]
                logits = [self._sequences[row].advance(piece, every) for piece in pieces]
                found = torch.cat(logits) if every else logits[-1]
                if len(found) != count:
                    raise ValueError(f"it returns the logits of {len(found)} tokens for {count}")
                return found
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                names = ", ".join(inputs.names) or "prompt"
                inputs.error = f"the model fails with its {names}: {type(error).__name__}: {error}"
        return self._opening.no_logits(count)
