"""The user's model on loan: switched to paged attention while the engine runs, given back as it was."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import attention
from .attention import LayerProbe, LayerShape, PagedLayer, StepHolder


class ModelLoan:
    """Borrows a model and gives it back.

    While it is out, its modules see private copies of their configs, which name our attention; so a second model built
    from the same config object goes on as before. Parameters, buffers and hooks are never touched.

    Args:
        model (`PreTrainedModel`): any decoder-only model whose attention goes through `AttentionInterface`.

    Raises:
        ValueError: the model cannot be run by this engine; the message says why.
    """

    _MARK = "_async_batching_on_loan"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.holder = StepHolder()
        self.takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._training: dict[nn.Module, bool] = {}
        self._configs: list[tuple[nn.Module, str, PreTrainedConfig]] = []
        self._layers: list[nn.Module] = []
        self.out = False
        self._refuse_unfit()

    def _refuse_unfit(self) -> None:
        model = self.model
        name = type(model).__name__
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise ValueError(f"{name} cannot generate: async_batching needs a transformers model with a language head")
        if model.config.is_encoder_decoder:
            raise ValueError(f"{name} is an encoder-decoder, async_batching runs decoder-only models")
        devices = {str(p.device) for p in model.parameters()}
        if len(devices) > 1:
            raise ValueError(f"{name} is spread over {sorted(devices)}, async_batching needs it on one device")
        if getattr(model, "_tp_size", None) not in (None, 1):
            raise ValueError(f"{name} is split by tensor parallelism, which async_batching does not run yet")

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @property
    def stated_positions(self) -> int | None:
        """The longest sequence that the config states."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def learned_positions(self) -> int | None:
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
        """Switch the model over. Undone by `give_back`, also when this raises.

        Raises:
            RuntimeError: the model is out on another loan.
        """
        if getattr(self.model, self._MARK, False):
            raise RuntimeError("this model is generating already: stop the manager that has it first")
        setattr(self.model, self._MARK, True)
        self.out = True
        copies: dict = {}
        for module in self.model.modules():
            self._training[module] = module.training
            module.training = False
            for name, value in list(vars(module).items()):
                if isinstance(value, PreTrainedConfig):
                    self._configs.append((module, name, value))
                    setattr(module, name, copy.deepcopy(value, copies))
        try:
            self.model.set_attn_implementation(attention.NAME)
            if self.model.config._attn_implementation != attention.NAME:
                raise ValueError(
                    f"{type(self.model).__name__} does not let its attention be replaced (it does not go through "
                    "AttentionInterface), which async_batching needs"
                )
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        if not self.out:
            return
        self.out = False
        delattr(self.model, self._MARK)
        for module in self._layers:
            delattr(module, PagedLayer.ATTRIBUTE)
        for module, name, config in self._configs:
            setattr(module, name, config)
        for module, training in self._training.items():
            module.training = training
        self._layers.clear()
        self._configs.clear()
        self._training.clear()

    @torch.no_grad()
    def probe(self) -> dict[nn.Module, LayerShape]:
        """Run two tokens through the borrowed model and see which modules attend, with what shapes.

        Raises:
            ValueError: an attention layer asks for something that is not supported, or none attends.
        """
        probe = LayerProbe()
        for module in self.model.modules():
            setattr(module, PagedLayer.ATTRIBUTE, probe)
        try:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
            self.forward(ids, torch.arange(2, device=self.model.device)[None], ids[0, :1])
        except NotImplementedError as error:
            raise ValueError(f"{type(self.model).__name__} is not supported by async_batching yet: {error}") from error
        finally:
            for module in self.model.modules():
                delattr(module, PagedLayer.ATTRIBUTE)
        stated = self.model.config.get_text_config(decoder=True).num_hidden_layers
        if len(probe.shapes) != stated:
            raise ValueError(
                f"{type(self.model).__name__} has {stated} layers of which {len(probe.shapes)} attend through "
                "AttentionInterface, async_batching needs all of them to"
            )
        return probe.shapes

    def attach(self, layers: dict[nn.Module, PagedLayer]) -> None:
        for module, layer in layers.items():
            setattr(module, PagedLayer.ATTRIBUTE, layer)
            self._layers.append(module)

    def storages(self) -> list[int]:
        """Where the weights lie."""
        return [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Logits `[R, V]` of the packed tokens at `keep` `[R]`; `ids` and `positions` are `[1, T]`."""
        kept = {"logits_to_keep": keep} if self.takes_logits_to_keep else {}
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, **kept).logits[0]
        return logits if kept else logits[keep]
