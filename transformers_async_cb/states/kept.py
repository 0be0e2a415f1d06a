"""What a model keeps of a sequence in its cache object, and how that object is made of rows of tables."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache

from .. import attention
from ..attention import LayerShape, Place
from ..attention.in_pages import OnPages
from ..attention.probe import NAME as PROBE
from ..attention.probe import probing
from ..model import CLOSE, CLOSE_ROUNDED, ModelLoan, NotPaged, difference, trial
from ..sequential import Opening, tensors_of


# Tokens of a trial run, and where it is cut to see whether the model goes on from a state: with one token, too, which
# some models compute in another way.
_TRIAL_TOKENS, _CUTS = 32, (13, 31)

# What models call what they keep.
_CACHE_NAMES = ("past_key_values", "cache_params", "state")

# Inputs of a model that are made anew for each step, or that packed sequences need not have: none is padded.
_MADE_ANEW = ("input_ids", "position_ids", "attention_mask", "cache_position", "logits_to_keep")


class State(NamedTuple):
    """One tensor of a cache object that every sequence has a part of."""

    shape: tuple[int, ...]  # for one sequence
    dtype: torch.dtype
    dim: int  # of the sequences

    @property
    def bytes(self) -> int:
        """Of one sequence."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def table(self, rows: int, device: torch.device) -> torch.Tensor:
        shape = (*self.shape[: self.dim], rows, *self.shape[self.dim + 1 :])
        return torch.empty(shape, dtype=self.dtype, device=device)


class Kept:
    """The states that a model keeps beside pages, and the model's own forward with them.

    A cache object with the states of any rows is a copy of one that the model has made, with other tensors in the
    places of the states: so flags that say that there is a state, and whatever else it holds, are the model's own.
    Some models keep states in attributes of their modules as well, which are set before they run and emptied after.

    Args:
        loan (`ModelLoan`): the model, borrowed.

    Attributes:
        shapes (`dict`): of the layers that attend, where attention is on pages.
        states (`list[State]`): in the order in which they are found in a cache object, then in modules.
        continues (`bool`): whether the model goes on from a state, with one token or several, as if all had come
            together. With one, as it decodes, it always can, but some then do not get quite the same.

    Raises:
        NotPaged: it keeps what grows with a sequence, or nothing that could be told from that.
    """

    @torch.no_grad()
    def __init__(self, loan: ModelLoan) -> None:
        if loan.not_batched:
            raise NotPaged(loan.not_batched)
        self.shapes: dict[Place, LayerShape] = loan.probe(packed=False) if loan.paged else {}
        self._loan = loan
        self._model = loan.model
        self.device = loan.device
        self._takes_logits_to_keep = loan.takes_logits_to_keep
        self._attends = loan.paged
        self._in_modules: list[tuple[nn.Module, str]] = []  # attributes that are states
        configs = self._model.config, self._model.config.get_text_config(decoder=True)
        self._shared = {id(config): config for config in configs}  # what copies of a cache object have in common
        with trial(self._model, "batched states"):
            self._try_out(Opening(loan).begin(_TRIAL_TOKENS).kwargs)

    @property
    def bytes(self) -> int:
        """Of the states of one sequence."""
        return sum(state.bytes for state in self.states)

    @property
    def kept_per_token(self) -> int:
        """Bytes, of sequences as long as a trial: for want of anything that grows, the states count as if they did."""
        return max(1, self.bytes // _TRIAL_TOKENS)

    def begin(self) -> Any:
        """The cache object of sequences that begin: `None` if the model makes it itself."""
        self._set_modules([None] * len(self._in_modules))
        return copy.deepcopy(self._empty, self._shared.copy())

    def resume(self, states: list[torch.Tensor]) -> Any:
        """The cache object of sequences that have `states`, which the model may write to."""
        self._set_modules(states[len(self._places) :])
        memo = self._shared | {id(place): state for place, state in zip(self._places, states, strict=False)}
        return copy.deepcopy(self._example, memo)

    def advance(
        self, cache: Any, ids: torch.Tensor, positions: torch.Tensor, every: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the next tokens of sequences with as many each.

        Args:
            cache: what `begin` or `resume` returned, written to.
            ids (`torch.Tensor`), positions (`torch.Tensor`): int64 `[B, n]`.
            every (`bool`): whether the logits of all tokens are wanted.

        Returns:
            Logits `[B, n or 1, V]`, and the states to resume with.
        """
        try:
            logits, cache = self._run(cache, ids, positions, every)
            return logits, self._of(cache)
        finally:
            self._set_modules([None] * len(self._in_modules))

    def _of(self, cache: Any) -> list[torch.Tensor]:
        """The states in a cache object, and in modules."""
        in_cache = [tensor for tensor, state in zip(tensors_of(cache), self._each, strict=True) if state]
        return in_cache + [getattr(module, name) for module, name in self._in_modules]

    def _set_modules(self, states: Sequence[torch.Tensor | None]) -> None:
        for (module, name), state in zip(self._in_modules, states, strict=True):
            setattr(module, name, state)

    def _run(
        self, cache: Any, ids: torch.Tensor, positions: torch.Tensor, every: bool = False
    ) -> tuple[torch.Tensor, Any]:
        inputs = {"input_ids": ids, **self._constant}
        if cache is not None:
            inputs[self._name] = cache
        if self._takes_positions:
            inputs["position_ids"] = positions
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = 0 if every else 1
        with self._loan.autocasting():
            outputs = self._model(**inputs, return_dict=True)
        # The hook that models override, which loops given as `custom_generate` call too.
        cache = self._model._update_model_kwargs_for_generation(outputs, {self._name: cache})[self._name]
        return outputs.logits if every else outputs.logits[:, -1:], cache

    # ------------------------------------------------------------------------------------------------ trial

    def _try_out(self, begun: dict[str, Any]) -> None:
        ids = (torch.arange(_TRIAL_TOKENS, device=self.device)[None] % 2 + 2) % self._loan.vocabulary
        inputs = self._model.prepare_inputs_for_generation(
            ids, is_first_iteration=True, next_sequence_length=None, **copy.deepcopy(begun)
        )
        caches = {name: value for name, value in inputs.items() if isinstance(value, Cache)}
        rest = {k: v for k, v in inputs.items() if k not in (*_MADE_ANEW, *caches) and not _says_nothing(v)}
        if unknown := sorted(k for k, v in rest.items() if not isinstance(v, (bool, int, float, str))):
            raise NotImplementedError(f"generate prepares {', '.join(unknown)} for it")
        self._constant = rest
        self._takes_positions = self._attends or inputs.get("position_ids") is not None
        if len(caches) > 1:
            raise NotImplementedError(f"generate prepares several caches for it: {', '.join(sorted(caches))}")
        self._name, self._empty = next(iter(caches.items()), ("", None))
        if self._attends:
            self._model.set_attn_implementation(PROBE)
        try:
            if not caches:
                self._find_name(ids[:, :1])
            if self._attends:
                kind = type(self._empty)
                if not isinstance(self._empty, Cache):
                    raise NotImplementedError(f"its {kind.__name__} is no cache whose keys could lie in pages")
                self._empty.__class__ = type(kind.__name__, (OnPages, kind), {})
            self._find_states()
            self.continues = self._goes_on()
        finally:
            if self._attends:
                self._model.set_attn_implementation(attention.NAME)

    def _trial(self, cache: Any, batch: int, start: int, end: int) -> tuple[torch.Tensor, Any]:
        """Attention answers zero, which is no less a function of what comes before."""
        at = torch.arange(start, end, device=self.device).expand(batch, -1)
        with probing() if self._attends else nullcontext():
            return self._run(cache, at % 7 + 2, at)

    def _find_name(self, ids: torch.Tensor) -> None:
        """Of a cache that the model makes itself when it gets none."""
        with probing() if self._attends else nullcontext():
            outputs = self._model(input_ids=ids, **self._constant)
        name = next((name for name in _CACHE_NAMES if name in outputs), None)
        if name is None:
            raise NotImplementedError("it keeps nothing of a sequence in a cache")
        self._name = name
        if self._attends:  # on pages, which it cannot make itself
            self._empty = type(outputs[name])()

    def _find_states(self) -> None:
        """Two runs, of one sequence of a token and of two longer ones: what differs in one dimension is a state, and
        what does not differ is no sequence's own. What grows up to a window is none either."""
        before = self._attributes()
        _, one = self._trial(self.begin(), 1, 0, 1)
        ones = list(tensors_of(one))
        in_modules = [place for place, value in self._attributes().items() if value is not before.get(place)]
        ones += (getattr(*place) for place in in_modules)
        for module, name in in_modules:
            setattr(module, name, None)
        _, two = self._trial(self.begin(), 2, 0, _TRIAL_TOKENS)
        twos = [*tensors_of(two), *(getattr(*place) for place in in_modules)]
        if len(ones) != len(twos):
            raise NotImplementedError("what it keeps of a sequence depends on its length")
        dims = [_differing(a, b) for a, b in zip(ones, twos, strict=True)]
        in_cache = len(dims) - len(in_modules)
        self._in_modules = [place for place, dim in zip(in_modules, dims[in_cache:], strict=True) if dim is not None]
        self._each = [dim is not None for dim in dims[:in_cache]]
        self._places = [tensor for tensor, state in zip(ones, self._each, strict=False) if state]
        found = [(tensor, dim) for tensor, dim in zip(ones, dims, strict=True) if dim is not None]
        self.states = [State(tuple(tensor.shape), tensor.dtype, dim) for tensor, dim in found]
        if not self.states:
            raise NotImplementedError("it keeps no state of a sequence")
        self._example = one
        _, cache = self._trial(self.resume([tensor for tensor, _ in found]), 1, 1, 2)
        for state, tensor in zip(self.states, self._of(cache), strict=True):
            if (state.shape, state.dtype) != (tensor.shape, tensor.dtype):
                raise NotImplementedError("what it keeps of a sequence changes its form")

    def _attributes(self) -> dict[tuple[nn.Module, str], torch.Tensor]:
        """Tensors that modules hold beside their parameters and buffers."""
        return {
            (module, name): value
            for module in self._model.modules()
            for name, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        }

    def _goes_on(self) -> bool:
        """Whether a sequence that comes in parts gets the logits that it gets as one, and is in the same state."""
        rounds = self._loan.rounds
        try:
            if self._off_in_parts() <= (CLOSE_ROUNDED if rounds else CLOSE):
                return True
            if not rounds:
                return False
            with self._loan.in_float32():  # where no expert is chosen otherwise
                return self._off_in_parts() <= CLOSE
        except Exception:  # it takes one token, or any number where there is no state
            return False

    def _off_in_parts(self) -> float:
        expected, cache = self._trial(self.begin(), 1, 0, _TRIAL_TOKENS)
        whole = self._of(cache)
        _, cache = self._trial(self.begin(), 1, 0, _CUTS[0])
        for start, end in pairwise((*_CUTS, _TRIAL_TOKENS)):
            found, cache = self._trial(self.resume(self._of(cache)), 1, start, end)
        pairs = [(found, expected), *zip(self._of(cache), whole, strict=True)]
        return max(difference(a, b) for a, b in pairs)


def _says_nothing(value: object) -> bool:
    """Whether an input is none: of a model that sees, there may be one for each kind of inputs, and none of these."""
    return value is None or (isinstance(value, dict) and all(part is None for part in value.values()))


def _differing(one: torch.Tensor, two: torch.Tensor) -> int | None:
    """The dimension of the sequences, in what a model keeps of one and of two that are longer; `None`: it has none."""
    dims = [dim for dim, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if not dims:
        return None
    if len(dims) > 1 or (one.shape[dims[0]], two.shape[dims[0]]) != (1, 2):
        raise NotImplementedError("what it keeps of a sequence grows with it, and does not lie in pages")
    return dims[0]
