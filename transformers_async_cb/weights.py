"""A model's weights as they lie in memory, quantised ones included."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stored(model: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors in memory of which parameters and buffers consist: themselves, or the parts of those that torch can
    take apart (packed numbers and scales)."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from _parts(tensor)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


@torch.no_grad()
def digest(model: nn.Module, device: torch.device) -> tuple:
    """Of all weights, which it reads twice, to tell whether they have changed. Counters that autograd keeps do not
    tell: writing through `.data` passes them by. Weights whose scales may lie elsewhere (parameters of a class that
    torch cannot take apart), or that are not in memory, are taken to have changed."""
    sums, products = [], []
    for tensor in stored(model):
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta:
            return (object(),)
        if tensor.numel():
            lines = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
            sums.append(lines.view(_INTEGERS[lines.itemsize]).sum(dtype=torch.int64).to(device))  # sees every bit
            if lines.dtype in (torch.float32, torch.bfloat16, torch.float16):  # sees the order
                across, down = (torch.arange(n, device=lines.device).cos() for n in reversed(lines.shape))
                with torch.autocast(lines.device.type, enabled=False):
                    products.append(((lines @ across.to(lines.dtype)).double() @ down.double()).to(device))
    return tuple(torch.stack(values).tolist() if values else None for values in (sums, products))


def round_off(model: nn.Module) -> bool:
    """Whether products with some of the weights have less than the precision of float32."""
    return getattr(model, "is_quantized", False) or any(
        is_traceable_wrapper_subclass(parameter) or parameter.dtype != torch.float32
        for parameter in model.parameters()
    )
