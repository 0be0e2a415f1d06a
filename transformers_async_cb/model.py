"""The user's model on loan: switched to paged attention while the engine runs, given back as it was."""

from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from . import attention, weights
from .attention import Attached, LayerShape, PagedLayer, Place
from .attention.in_pages import TokensBefore
from .attention.probe import NAME as PROBE
from .attention.probe import Probe, probing
from .interpreter import collect
from .linear import Products, noting_inputs
from .model_inputs import has_own_generate
from .placement import Placement


# Parts beside the layers that are one kernel as they are, or nothing.
_NOT_WORTH_COMPILING = (nn.Embedding, nn.Linear, nn.Dropout, nn.Identity, nn.ModuleList)

# Attributes in which PEFT keeps what its layers do.
_ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")

# Fields of a config that say what a forward pass returns.
_SWITCHES = frozenset({"use_cache", "output_attentions", "output_hidden_states", "return_dict"})

# Types of attributes that are compared by value.
_PLAIN = (bool, int, float, str)

# Whose functions do to a model what we have seen them do.
_LIBRARIES = ("transformers", "accelerate")

# Tokens of the trial run, and how far off what must be alike may be.
_TRIAL_TOKENS = 40
CLOSE, CLOSE_ROUNDED = 1e-4, 2e-2

# Seconds to wait for a model that is out for a manager that was dropped, and which finishes its requests first.
PATIENCE = 60


class NotPaged(ValueError):
    """The model cannot be run on pages; the message says why."""


@contextmanager
def trial(model: PreTrainedModel, what: str, refusal: type[ValueError] = NotPaged) -> Generator[None]:
    """Within, a model is tried out with `what`. Raises `refusal` that says what it does that is not supported
    (`NotImplementedError`), or how it failed; but for want of memory, which says nothing about the model."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as error:
        raise refusal(f"{type(model).__name__} is not supported by async_batching yet: {error}") from error
    except Exception as error:
        raise refusal(
            f"{type(model).__name__} is not supported by async_batching: a trial run of {what} failed with "
            f"{type(error).__name__}: {error}"
        ) from error


class _OnLoan:
    """What marks a model that is out. A copy would have the mark, and pages of its own."""

    def __init__(self, loan: ModelLoan) -> None:
        self.loan = loan
        self.over = threading.Event()

    def wait(self) -> None:
        """Wait for the model, if nobody holds the manager that has it.

        Raises:
            RuntimeError: somebody does, or it takes longer than `PATIENCE`.
        """
        if not self.loan.dropped:
            collect()  # nobody may hold it but a cycle of references
        if self.over.wait(PATIENCE if self.loan.dropped else 0):
            return
        if self.loan.dropped:
            raise RuntimeError(
                "this model is generating still, for a manager that was dropped and has not finished its requests "
                f"within {PATIENCE} s: try again later"
            )
        raise RuntimeError("this model is generating already: stop the manager that has it first")

    def __reduce__(self) -> tuple:
        raise RuntimeError(
            "this model is generating with async_batching and cannot be copied or pickled meanwhile: stop the manager "
            "first, or do it inside manager.pause()"
        )


class ModelLoan:
    """Borrows a model and gives it back.

    While it is out, its modules see private copies of their configs, which name our attention; so a second model built
    from the same config object goes on as before. Hooks are never touched, and weights keep their values.

    Args:
        model (`PreTrainedModel`): any that `generate` runs from token ids.

    Attributes:
        paged (`bool`): whether attention is ours while the model is out. Otherwise the model stays as it is.
        batched (`bool`): whether its sequences are computed together while it is out.
        placement (`Placement`): where the model computes.
        autocast (`torch.dtype`, *optional*): of the autocast under which the model computes; see `note_autocast`.
        dropped (`bool`): nobody holds the manager that it is for, so it ends by itself.

    Raises:
        ValueError: the model cannot be run by this engine; the message says why.
    """

    _MARK = "_async_batching_on_loan"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._counts_from_cache = getattr(model.config.get_text_config(), "attn_temperature_tuning", False)
        self.takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._training: dict[nn.Module, bool] = {}
        self._configs: list[tuple[nn.Module, str, PreTrainedConfig]] = []
        self._layers: list[nn.Module] = []
        self._attend_again: set[nn.Module] = set()
        self._shapes: dict[Place, LayerShape] = {}
        self._compiled: dict[nn.Module, object] = {}  # and what they were before
        self._compiled_calls: dict[nn.Module, object] = {}  # made once: it takes a while to make them
        self._compiled_by_user: list[tuple[nn.Module, str, object]] = []
        self._products: Products | None = None
        self.autocast: torch.dtype | None = None
        self.out = self.dropped = False
        self.paged = self.batched = True
        self._refuse_unfit()
        self.placement = Placement.of(model)

    def _refuse_unfit(self) -> None:
        model = self.model
        name = type(model).__name__
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise ValueError(f"{name} cannot generate: async_batching needs a transformers model with a language head")
        encodes = model.config.is_encoder_decoder
        if encodes and (model.main_input_name != "input_ids" or has_own_generate(model)):
            raise ValueError(
                f"{name} is an encoder-decoder that does not read token ids, or has a generate of its own, which "
                "async_batching does not call"
            )
        if getattr(model, "_tp_size", None) not in (None, 1):
            raise ValueError(f"{name} is split by tensor parallelism, which async_batching does not run yet")

    @property
    def device(self) -> torch.device:
        """Where the model computes, and begins to if it is spread over several."""
        return self.placement.devices[0]

    @property
    def not_batched(self) -> str:
        """Why its sequences cannot be computed together, if they cannot, whatever layers it has."""
        name, devices = type(self.model).__name__, self.placement.devices
        if self.model.config.is_encoder_decoder:
            return f"{name} is an encoder-decoder, of which async_batching batches none"
        if len(devices) > 1:
            return (
                f"{name} is spread over {', '.join(map(str, devices))}, and a batch of async_batching is laid out on "
                "one device"
            )
        return ""

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @property
    def stated_positions(self) -> int | None:
        """The longest sequence that the config states."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def position_limit(self) -> tuple[int | None, str]:
        """Positions that a sequence may have, `None` if as many as there is room for, and what they are."""
        learned = self._learned_positions()
        alike = _alike_positions(self.model.config.get_text_config(decoder=True))
        if alike is None or (learned is not None and learned <= alike):
            return learned, "positions that the model has learned"
        return alike, "positions up to which the model's rotary frequencies are the same"

    def _learned_positions(self) -> int | None:
        """How many positions the model has embeddings for, `None` if it computes them."""
        stated = self.stated_positions
        if stated is None:
            return None
        tokens = self.model.get_input_embeddings()
        for module in self.model.modules():
            # Some tables have a few more rows than positions: OPT keeps two for padding.
            if isinstance(module, nn.Embedding) and module is not tokens and 0 <= module.num_embeddings - stated <= 8:
                return stated
        return None

    def borrow(self) -> None:
        """Switch the model over. Undone by `give_back`, also when this raises. A loan that ends by itself is waited
        for.

        Raises:
            NotPaged: its attention cannot be replaced, or could not be told where tokens are.
            RuntimeError: the model is out on another loan.
        """
        self.placement = Placement.of(self.model)  # which may have changed
        mark = _OnLoan(self)
        while (other := vars(self.model).setdefault(self._MARK, mark)) is not mark:  # of several, one has it
            other.wait()
        self.out = True
        copies: dict = {}
        for module in self.model.modules():
            self._training[module] = module.training
            module.training = False
            for name, value in list(vars(module).items()):
                if isinstance(value, PreTrainedConfig):
                    self._configs.append((module, name, value))
                    setattr(module, name, copy.deepcopy(value, copies))
        if not self.paged:
            return
        self._run_uncompiled()
        name = type(self.model).__name__
        try:
            if self.not_batched:
                raise NotPaged(self.not_batched)
            if "position_ids" not in inspect.signature(self.model.forward).parameters:
                raise NotPaged(
                    f"{name} counts positions itself (it takes no position_ids), async_batching packs sequences"
                )
            self.model.set_attn_implementation(attention.NAME)
            if self.model.config._attn_implementation != attention.NAME:
                raise NotPaged(
                    f"{name} does not let its attention be replaced (it does not go through "
                    "AttentionInterface), which async_batching needs"
                )
        except BaseException:
            self.give_back()
            raise

    def _run_uncompiled(self) -> None:
        """Run modules that the user has compiled (`model.compile()`, `model.forward = torch.compile(model.forward)`)
        as they are written, until the model is given back: compiled as a whole, a model makes its masks out of our
        sight, and would be compiled anew for pages. The engine compiles layers itself."""
        for module in self.model.modules():
            compiled = {"_compiled_call_impl": None}
            if (written := getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)) is not None:
                compiled["forward"] = written
            for name, as_written in compiled.items():
                if (before := getattr(module, name)) is not None:
                    self._compiled_by_user.append((module, name, before))
                    setattr(module, name, as_written)

    def give_back(self) -> None:
        if not self.out:
            return
        self.out = False
        self.run_as_written()
        for module, name, compiled in self._compiled_by_user:
            setattr(module, name, compiled)
        self._compiled_by_user.clear()
        if self._products is not None:
            self._products.remove()
        for module in self._layers:
            for name in (attention.ATTRIBUTE, attention.TURN):
                vars(module).pop(name, None)
        for module, name, config in self._configs:
            setattr(module, name, config)
        for module, training in self._training.items():
            module.training = training
        self._layers.clear()
        self._attend_again.clear()
        self._configs.clear()
        self._training.clear()
        vars(self.model).pop(self._MARK).over.set()

    @torch.no_grad()
    def probe(self, packed: bool = True) -> dict[Place, LayerShape]:
        """Run a few tokens through the borrowed model, see which modules attend, with what shapes, and that outside of
        attention a token's own id and position are all that counts: with other tokens before it, or fewer, what the
        last one asks of attention stays the same (in recurrent layers and convolutions it would not, nor where
        positions are counted).

        Args:
            packed (`bool`): whether tokens of several sequences are to be packed; otherwise the last is not looked at.

        Raises:
            NotPaged: the model asks for something that is not supported.
        """
        name = type(self.model).__name__
        self.separate_products()
        self.model.set_attn_implementation(PROBE)
        try:
            probe, groups, off = self._try_out()
            close = CLOSE_ROUNDED if self.rounds else CLOSE
            if packed and off > close and self.rounds:  # an expert that is chosen otherwise makes any difference
                with suppress(NotPaged), self.in_float32():
                    off, close = self._try_out()[2], CLOSE
        finally:
            self.model.set_attn_implementation(attention.NAME)
        if not probe.shapes:
            raise NotPaged(f"{name} has no layer that attends through AttentionInterface, which async_batching needs")
        kept = DynamicCache(config=self.model.config).layers
        for i, (place, shape) in enumerate(probe.shapes.items()):
            layer = getattr(place.module, "layer_idx", None)
            layer = i if layer is None else layer
            forgets = getattr(kept[layer], "sliding_window", None) if layer < len(kept) else None
            if forgets not in (None, shape.window or shape.chunk):
                raise NotPaged(
                    f"{name} generates with a cache that forgets all but {forgets} tokens, which its attention does "
                    "not ask for: async_batching would give other tokens than generate"
                )
        if packed and off > close:
            raise NotPaged(
                f"{name} lets tokens see one another outside of attention (a recurrence or a convolution), or counts "
                "positions itself: sequences that are packed would be mixed up"
            )
        self._products = Products(self.model, groups)
        self._shapes = probe.shapes
        return probe.shapes

    def _try_out(self) -> tuple[Probe, list[list[nn.Linear]], float]:
        """What a few tokens show of attention, the products that read the same tensor, and how far what the last token
        asks of attention is off when fewer tokens, and others, come before it."""
        count = min(_TRIAL_TOKENS, self.stated_positions or _TRIAL_TOKENS)
        positions = torch.arange(count, device=self.device)[None]
        seen = []
        with trial(self.model, "packed tokens without a cache"):
            for first, chosen in ((0, positions), (1, positions[:, -2:])):
                ids = torch.tensor([[first] * (chosen.shape[1] - 1) + [0]], device=self.device)
                last = torch.tensor([chosen.shape[1] - 1], device=self.device)
                with probing() as probe, noting_inputs(self.model) as groups:
                    logits = self.forward(ids, chosen, last)
                if len(logits) != len(last):  # a forward that takes it and does nothing with it
                    self.takes_logits_to_keep = False
                    logits = logits[last]
                seen.append([*probe.inputs, logits])
        off = max(difference(other, one) for one, other in zip(*seen, strict=True))
        return probe, groups, off

    def attach(self, layers: dict[Place, PagedLayer]) -> None:
        for place, layer in layers.items():
            shape = self._shapes[place]
            attached = Attached(*layer, shape.window, shape.chunk)
            if place.turn == 0:
                self._layers.append(place.module)
                setattr(place.module, attention.ATTRIBUTE, (attached,))
            else:
                self._attend_again.add(place.module)
                setattr(place.module, attention.ATTRIBUTE, (*getattr(place.module, attention.ATTRIBUTE), attached))

    def fuse_products(self) -> None:
        """Compute products that read the same tensor as one, until the model is given back. Their weights move to
        joined storage, and stay there until `separate_products`."""
        self._products.install()

    def separate_products(self) -> None:
        """Give weights that were joined storage of their own again, but not those that another loan computes with."""
        if self._products is not None and (self.out or self._MARK not in vars(self.model)):
            self._products.separate()

    def compile_layers(self) -> None:
        """Have the repeated layers compiled when they are next called: each entry of a module list that attends, and
        what small parts (rotary embedding, last norm) stand beside the list.

        One compilation serves all that are alike. Token counts are dynamic, so a step of one token would need another.
        """
        attending = set(self._layers)
        for parent in self.model.modules():
            lists = [child for child in parent.children() if isinstance(child, nn.ModuleList)]
            layers = [layer for entries in lists for layer in entries if attending & set(layer.modules())]
            for layer in layers:
                self._compile(layer, fullgraph=True)
            for child in parent.children() if layers else ():
                if not isinstance(child, _NOT_WORTH_COMPILING) and next(child.children(), None) is None:
                    self._compile(child, fullgraph=False)

    def _compile(self, module: nn.Module, fullgraph: bool) -> None:
        if module in self._compiled:
            return
        self._compiled[module] = module._compiled_call_impl
        if module in self._compiled_calls:
            module._compiled_call_impl = self._compiled_calls[module]
        else:
            module.compile(dynamic=True, fullgraph=fullgraph)
            self._compiled_calls[module] = module._compiled_call_impl

    def run_as_written(self) -> bool:
        """Undo `compile_layers`; returns whether there was anything to undo."""
        was_compiled = bool(self._compiled)
        for layer, implementation in self._compiled.items():
            layer._compiled_call_impl = implementation
        self._compiled.clear()
        return was_compiled

    def baked_in(self) -> list:
        """What a captured step cannot see change: where the weights lie, the functions hooked to the modules, the
        numbers and switches by which they go, and which of its adapters (PEFT) a module uses."""
        storages = [tensor.data_ptr() for tensor in weights.stored(self.model)]
        hooks = [
            (type(m), vars(m).get("forward"), *m._forward_hooks.values(), *m._forward_pre_hooks.values())
            for m in self.model.modules()
        ]
        adapters = [repr([vars(m).get(name) for name in _ADAPTER_STATE]) for m in self.model.modules()]
        numbers = [
            {name: value for name, value in vars(m).items() if type(value) in _PLAIN and name != attention.TURN}
            for m in self.model.modules()
        ]
        return storages + hooks + adapters + numbers

    def users_functions(self) -> list[Callable]:
        """What a user has hooked to the modules, or put in the place of their methods: nobody knows what it does."""
        found = []
        for module in self.model.modules():
            found += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
            found += [
                v for name, v in vars(module).items() if callable(v) and callable(getattr(type(module), name, None))
            ]
        return [function for function in found if not _is_of_a_library(function)]

    def weights(self) -> tuple:
        """See `weights.digest`."""
        return weights.digest(self.model, self.device)

    @property
    def rounds(self) -> bool:
        """Whether the model computes with less than the precision of float32 somewhere."""
        return self.autocast is not None or weights.round_off(self.model) or self._in_tf32

    @property
    def _in_tf32(self) -> bool:
        return self.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")

    @contextmanager
    def in_float32(self) -> Generator[None]:
        """Within, the model computes in float32, whatever the types of its weights (but quantised ones), autocast and
        the user's settings for products. Slow, and those settings are the whole process's."""
        autocast, self.autocast = self.autocast, None
        products = torch.backends.cuda.matmul
        precision = products.fp32_precision
        try:
            if self._in_tf32:
                products.fp32_precision = "ieee"
            with weights.in_float32(self.model):
                yield
        finally:
            self.autocast = autocast
            if products.fp32_precision != precision:
                products.fp32_precision = precision

    def note_autocast(self) -> None:
        """The model computes under the `torch.autocast` of the calling thread from now on, whatever thread runs it."""
        kind = self.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def autocasting(self) -> AbstractContextManager:
        """Within, this thread has the noted autocast. Weights are cast at each use: they may change."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    def form(self) -> list:
        """What an engine is built for: the config, modules, the shape, type and place of each weight, where they
        compute, autocast, and what the user has put in."""
        modules = [
            (type(m), *((p.shape, p.dtype, p.device) for p in m.parameters(False))) for m in self.model.modules()
        ]
        return [self.autocast, self.placement, self.settings(), *modules, *self.users_functions()]

    def settings(self) -> str:
        """What the config says, but for switches that trainers turn on and off and that change no token."""

        def telling(values: dict) -> dict:
            told = {name: value for name, value in values.items() if name not in _SWITCHES}
            return {name: telling(value) if isinstance(value, dict) else value for name, value in told.items()}

        return repr(telling(self.model.config.to_dict()))

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Logits `[R, V]` of the packed tokens at `keep` `[R]`; `ids` and `positions` are `[1, T]`."""
        kept = {"logits_to_keep": keep} if self.takes_logits_to_keep else {}
        if self._counts_from_cache:
            kept["past_key_values"] = TokensBefore(positions)
        for module in self._attend_again:
            setattr(module, attention.TURN, 0)
        with self.autocasting():
            logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, **kept).logits[0]
        return logits if self.takes_logits_to_keep else logits[keep]


def _is_of_a_library(function: Callable) -> bool:
    """Whether it was written there, whatever it wraps."""
    function = getattr(function, "func", function)  # of a partial
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] in _LIBRARIES


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far logits are from others, as a share of their size; of what is not finite, whether it is the same."""
    found, expected = found.float(), expected.float()
    same = (found == expected) | (found.isnan() & expected.isnan())
    off = torch.where(same, 0, found - expected).norm()
    share = float(off / torch.where(expected.isfinite(), expected, 0).norm()) if off else 0.0
    return math.inf if math.isnan(share) else share


def _alike_positions(config: PreTrainedConfig) -> int | None:
    """Positions for which the rotary frequencies do not depend on the longest sequence of a batch, `None` for all: a
    config may state one set of parameters, or one for each kind of layer."""
    limits, todo = [], [getattr(config, "rope_parameters", None)]
    while todo:
        parameters = todo.pop()
        if not isinstance(parameters, dict):
            continue
        kind = parameters.get("rope_type")
        if kind == "dynamic":
            limits.append(config.max_position_embeddings)
        elif kind == "longrope":
            limits.append(parameters["original_max_position_embeddings"])
        todo += parameters.values()
    return min(limits, default=None)
