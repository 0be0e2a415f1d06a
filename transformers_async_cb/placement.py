"""Where a model computes, which is not always where its weights are: accelerate may keep those in host memory or on
disk, and fetch what a module needs when that runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn


class Placement(NamedTuple):
    """Where a model computes.

    Attributes:
        devices (`tuple`): on which modules with weights run, in the order of the modules, each once.
        offloaded (`bool`): whether some weights are elsewhere while nothing runs.
    """

    devices: tuple[torch.device, ...]
    offloaded: bool

    @classmethod
    def of(cls, model: nn.Module) -> Placement:
        """Raises `ValueError` for weights that are nowhere, and for a model that has none."""
        fetched_to: dict[nn.Module, torch.device] = {}
        for module in model.modules():
            for hook in _hooks(module):
                if hook.offload:
                    device = torch.empty(0, device=hook.execution_device).device  # with its index
                    fetched_to.update((m, device) for m in (module.modules() if hook.place_submodules else [module]))
        devices: dict[torch.device, None] = {}
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                device = fetched_to.get(module) if parameter.is_meta else parameter.device
                if device is None:
                    raise ValueError(f"{type(model).__name__} has no weights in {name}: they are on the meta device")
                devices[device] = None
        if not devices:
            raise ValueError(f"{type(model).__name__} has no weights")
        return cls(tuple(devices), bool(fetched_to))


def _hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    for each in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(each, AlignDevicesHook):
            yield each
