"""Products with the model's weights: those that read the same tensor as one, those of few rows on a kernel of ours."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from ..attention import current_step


class Shared:
    """Several products of one input, computed as one when the first of them is asked for.

    Attributes:
        weight (`nn.Parameter`): `[sum of out_features, in_features]`; the members' weights are views of it.
        bias (`nn.Parameter`, *optional*): likewise.
        sizes (`list[int]`): out_features of each member.
    """

    def __init__(self, members: list[nn.Linear]) -> None:
        self.members = members
        self.sizes = [member.out_features for member in members]
        self.weight = self._join([member.weight for member in members])
        self.bias = None if members[0].bias is None else self._join([member.bias for member in members])
        self.counters = _counters(self.weight)
        self.stand_ins = [SharedProduct(member, self, index) for index, member in enumerate(members)]
        self.input: torch.Tensor | None = None
        self.parts: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def _join(parameters: list[nn.Parameter]) -> nn.Parameter:
        joined = torch.cat([parameter.data for parameter in parameters])
        for parameter, view in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
            parameter.data = view
        return nn.Parameter(joined, requires_grad=False)

    def intact(self) -> bool:
        """Whether the members' weights still lie here: who trains may have given them other storage, or others."""
        if any(
            one.weight is not it.weight or one.bias is not it.bias
            for one, it in zip(self.stand_ins, self.members, strict=True)
        ):
            return False
        at, bias_at = self.weight.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()
        for member, size in zip(self.members, self.sizes, strict=True):
            if member.weight.data_ptr() != at or (self.bias is not None and member.bias.data_ptr() != bias_at):
                return False
            at += size * self.weight.stride(0) * self.weight.element_size()
            bias_at += 0 if self.bias is None else size * self.bias.element_size()
        return True

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self.input is not x:  # the product first: a thread that has no business here changes nothing
            self.parts = product(x, self.weight, self.bias, self.counters).split(self.sizes, dim=-1)
            self.input = x
        part = self.parts[index]
        if index == len(self.sizes) - 1:
            self.input, self.parts = None, ()
        return part

    def separate(self) -> None:
        """Give each member that has not left already storage of its own again."""
        self.stand_ins.clear()  # which hold this, and with it the joined weights
        for joined, parameters in (
            (self.weight, [member.weight for member in self.members]),
            (self.bias, [member.bias for member in self.members]),
        ):
            for parameter in parameters:
                if joined is not None and _storage(parameter) == _storage(joined):
                    parameter.data = parameter.data.clone()


class Product(nn.Module):
    """Stands in for an `nn.Linear`, with its very parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.counters = _counters(linear.weight)
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias, self.counters)


class SharedProduct(nn.Module):
    """Stands in for one of the members of a `Shared`."""

    def __init__(self, linear: nn.Linear, shared: Shared, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.shared, self.index = shared, index
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.part(self.index, x)


class Products:
    """The linear layers of a model that this package may compute its own way.

    Args:
        model (`nn.Module`): with its layers as they are.
        groups (`list`): of layers that read the same tensor, in the order they do; see `noting_inputs`.
    """

    def __init__(self, model: nn.Module, groups: list[list[nn.Linear]]) -> None:
        self.model = model
        self.groups = groups
        self._shared: list[Shared] = []
        self._alone: dict[nn.Linear, Product] = {}  # kept, as captured steps count in their counters
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def install(self) -> None:
        """Put the stand-ins in place. Weights are joined the first time, and again if they have moved."""
        groups = [group for group in self.groups if len(group) > 1]
        if not self._shared or not all(shared.intact() for shared in self._shared):
            self.separate()
            for group in groups:
                self._shared.append(Shared(group))
        stand_ins: dict[nn.Module, nn.Module] = {}
        for linear in (group[0] for group in self.groups if len(group) == 1 and _plain(group[0])):
            alone = self._alone.get(linear)
            if alone is None or alone.weight is not linear.weight or alone.bias is not linear.bias:
                alone = self._alone[linear] = Product(linear)
            stand_ins[linear] = alone
        for shared in self._shared:
            if all(_plain(member) for member in shared.members):  # it may have got hooks since
                stand_ins.update(zip(shared.members, shared.stand_ins, strict=True))
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                if child in stand_ins:
                    parent._modules[name] = stand_ins[child]
                    self._replaced.append((parent, name, child))

    def remove(self) -> None:
        """Put the layers back. Their weights stay joined for the next time, which they do not show."""
        for parent, name, child in self._replaced:
            parent._modules[name] = child
        self._replaced.clear()

    @torch.inference_mode(False)  # of a caller who has it on, weights would come back that cannot be trained
    def separate(self) -> None:
        """Give the weights storage of their own again, one group after another: never all of them twice in memory."""
        while self._shared:
            self._shared.pop().separate()


@contextmanager
def noting_inputs(model: nn.Module) -> Generator[list[list[nn.Linear]]]:
    """Within, one forward pass fills the list that this yields: plain linear layers, those of one parent module that
    read the same tensor together. Layers with hooks, of a subclass, or called more than once are left out."""
    groups: list[list[nn.Linear]] = []
    calls: dict[nn.Linear, int] = {}
    inputs: list[tuple[nn.Module, torch.Tensor, nn.Linear]] = []
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    handles = []
    for parent in model.modules():
        for child in parent.children():
            if _plain(child):

                def note(linear: nn.Linear, given: tuple, parent: nn.Module = parent) -> None:
                    calls[linear] = calls.get(linear, 0) + 1
                    inputs.append((parent, given[0], linear))

                handles.append(child.register_forward_pre_hook(note))
    try:
        yield groups
    finally:
        for handle in handles:
            handle.remove()
    previous: tuple[nn.Module, torch.Tensor] | None = None
    for parent, x, linear in inputs:
        if calls[linear] > 1:
            continue
        joins = (
            previous is not None
            and previous[0] is parent
            and previous[1] is x
            and _joinable(groups[-1][0], linear, uses)
            and _joinable(linear, groups[-1][0], uses)
        )
        if joins:
            groups[-1].append(linear)
        else:
            groups.append([linear])
        previous = (parent, x)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _plain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    )


def _joinable(linear: nn.Linear, other: nn.Linear, uses: dict[int, int]) -> bool:
    """Whether the weights of `linear` may move: nobody else has them, they are not part of something larger, and torch
    can give them other storage, which tensors of inference mode do not survive."""
    parameters = [linear.weight] + ([] if linear.bias is None else [linear.bias])
    return (
        linear.in_features == other.in_features
        and linear.weight.dtype == other.weight.dtype
        and (linear.bias is None) == (other.bias is None)
        and all(uses.get(id(p)) == 1 and p.is_contiguous() and not p.is_inference() for p in parameters)
        and all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in parameters)
    )


def _counters(weight: torch.Tensor) -> torch.Tensor:
    """Zeros that the few-row kernel counts in, and leaves zero."""
    return torch.zeros(-(-weight.shape[0] // 16), dtype=torch.int32, device=weight.device)


@torch.library.custom_op("transformers_async_cb::product", mutates_args=("counters",))
def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counters: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias`, as `nn.functional.linear`.

    Args:
        x (`torch.Tensor`): `[..., in_features]`.
        weight (`torch.Tensor`): `[out_features, in_features]`.
        bias (`torch.Tensor`, *optional*): `[out_features]`.
        counters (`torch.Tensor`): int32 zeros, one for 16 out_features; no two calls may use them at once.

    Raises:
        RuntimeError: the calling thread computes no step.
    """
    current_step()
    if x.device.type == "cuda":
        from . import triton

        if triton.suits(x, weight):
            return triton.few_rows(x, weight, bias, counters)
    return F.linear(x, weight, bias)


@product.register_fake
def _(x, weight, bias, counters):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
