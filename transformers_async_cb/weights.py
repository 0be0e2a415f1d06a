"""A model's weights as they lie in memory, quantised ones included."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


_HALF = (torch.bfloat16, torch.float16)
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


@contextmanager
def in_float32(model: nn.Module) -> Generator[None]:
    """Within, the model computes in float32, with the values that its weights have. The layers of module lists are
    cast while they are called, and put back, so that there is a copy of one of them at a time; what else the model has
    stays cast. Quantised weights stay what they are."""
    layers = dict.fromkeys(_layers(model))
    cast: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def put_back(module: nn.Module) -> None:
        for tensor, data in cast.pop(module, ()):
            tensor.data = data

    with ExitStack() as undone:
        for layer in layers:
            before = layer.register_forward_pre_hook(lambda layer, _: cast.update({layer: _cast(_tensors(layer))}))
            after = layer.register_forward_hook(lambda layer, *_: put_back(layer))
            for undo in (before.remove, after.remove, lambda layer=layer: put_back(layer)):
                undone.callback(undo)
        in_layers = {tensor for layer in layers for tensor in _tensors(layer)}
        undone.callback(put_back, model)
        cast[model] = _cast(tensor for tensor in _tensors(model) if tensor not in in_layers)
        yield


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of module lists, but for those within others."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _cast(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give those in half precision data in float32; returns what they had. Tensors of inference mode would not survive
    that."""
    plain = [tensor for tensor in tensors if type(tensor) in (torch.Tensor, nn.Parameter)]
    halves = [tensor for tensor in plain if tensor.dtype in _HALF and not tensor.is_inference()]
    had = [(tensor, tensor.data) for tensor in halves]
    for tensor in halves:
        tensor.data = tensor.data.float()
    return had
