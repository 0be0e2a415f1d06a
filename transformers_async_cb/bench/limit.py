"""The least time a workload can take on a device: bytes that must move, products that must be computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..gpu import free_memory
from ..groups import PageGroup
from ..model import ModelLoan
from .workload import Workload


class Rates(NamedTuple):
    """What a device can do, a second."""

    bytes: float  # read or written
    flops: float  # of matrix products


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """What a CUDA device does at its best of ten: large copies inside its memory, whose bytes are read and written,
    and products of 8,192 x 8,192 matrices in `dtype`."""
    rates = Rates(_copy_rate(device), _product_rate(device, dtype))
    torch.cuda.empty_cache()
    return rates


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(min(2**32, free_memory(device) // 4), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def _product_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=product))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ten runs after three, on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(13):
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return min(seconds[3:])


class LayerCost(NamedTuple):
    """What a token that one layer's attention looks back on costs a token that looks."""

    bytes: int  # its key and value
    flops: int  # of all query heads
    kept: PageGroup  # of a token a page: what it looks back on


class ModelCost(NamedTuple):
    """What a model must read and compute.

    Of the weights, tables that are only looked up (an input embedding that is not the head's as well) count neither
    as bytes nor as products. Of a mixture's experts, those count that `n` tokens need: `expert_share` of them for
    products, and as bytes as many as tokens that choose evenly touch.
    """

    weight_bytes: int  # experts left out
    token_flops: int  # two for each weight a token meets, the head's left out
    head_flops: int  # of a token that is sampled
    layers: Counter[LayerCost]
    expert_bytes: int = 0
    expert_share: float = 1.0  # of the experts, those that a token chooses

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelCost:
        """Raises `ValueError` for a model that the engine does not know how to run."""
        loan = ModelLoan(model)
        loan.borrow()
        try:
            shapes = loan.probe().values()
        finally:
            loan.give_back()
        text = model.config.get_text_config(decoder=True)
        layers = Counter(
            LayerCost(
                shape.bytes_per_token,
                2 * text.num_attention_heads * (shape.key_dim + shape.value_dim),
                PageGroup(1, shape.window, shape.chunk),
            )
            for shape in shapes
        )
        head = model.get_output_embeddings().weight
        looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} - {head}
        weights = dict.fromkeys(model.get_decoder().parameters()) | {head: None}  # each once, tied ones too
        weights = [weight for weight in weights if weight not in looked_up]
        experts = [weight for weight in weights if weight.ndim == 3]  # [experts, out, in]
        chosen = getattr(text, "num_experts_per_tok", None)
        share = chosen / experts[0].shape[0] if experts and chosen else 1.0
        expert_weights = sum(weight.numel() for weight in experts)
        others = sum(weight.numel() for weight in weights) - expert_weights - head.numel()
        expert_bytes = sum(weight.nbytes for weight in experts)
        return cls(
            weight_bytes=sum(weight.nbytes for weight in weights) - expert_bytes,
            token_flops=2 * others + round(2 * expert_weights * share),
            head_flops=2 * head.numel(),
            layers=layers,
            expert_bytes=expert_bytes,
            expert_share=share,
        )

    def seconds(self, rates: Rates, tokens: int, samples: int, looks: Callable[[PageGroup], int], new: bool) -> float:
        """Of one step, the longer of the time for its bytes and the time for its products.

        Args:
            tokens (`int`): that pass through the layers.
            samples (`int`): that pass through the head.
            looks (`Callable`): how many tokens all of them together look back on, given what a layer keeps.
            new (`bool`): whether what they look back on is new, rather than read from the cache.
        """
        size = self.weight_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)
        flops = tokens * self.token_flops + samples * self.head_flops
        for layer, count in self.layers.items():
            seen = count * looks(layer.kept)
            flops += seen * layer.flops
            size += 0 if new else seen * layer.bytes
        return max(size / rates.bytes, flops / rates.flops)


def limit_seconds(model: PreTrainedModel, workload: Workload, rates: Rates) -> float | None:
    """The least time for `workload`, or `None` for a model whose costs are not known."""
    try:
        cost = ModelCost.of(model)
    except ValueError:
        return None
    return least_seconds(cost, rates, workload)


def least_seconds(cost: ModelCost, rates: Rates, workload: Workload) -> float:
    """What an ideal schedule takes, with room for all requests at once.

    The first step computes all prompts and samples a token for each; every later one reads the weights and the keys
    and values of all requests that still want a token, once, and samples one for each. Left out are activations,
    logits, what is written, norms, rotary embeddings, sampling, and all work of the host.
    """
    lengths = np.array([len(prompt) for prompt in workload.prompts(2)])
    limits = np.array(workload.limits())

    def within_prompts(kept: PageGroup) -> int:
        return sum(int(kept.seen(np.arange(length)).sum()) for length in lengths)

    total = cost.seconds(rates, int(lengths.sum()), len(lengths), within_prompts, new=True)
    for step in range(2, int(limits.max()) + 1):
        contexts = lengths[limits >= step] + step - 1

        def within_contexts(kept: PageGroup, contexts: np.ndarray = contexts) -> int:
            return int(kept.seen(contexts - 1).sum())

        total += cost.seconds(rates, len(contexts), len(contexts), within_contexts, new=False)
    return total
