"""Products that are computed our own way are the products they were, and the weights are as they were afterwards."""

from __future__ import annotations

import sys
import threading
import weakref

import pytest
import torch
from conftest import (
    FAMILIES,
    generate_alone,
    greedy,
    new_model,
    random_prompts,
    reference,
    run_in_interpreter,
    shared_model,
)
from torch import nn

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.linear import Product, Products, Shared, SharedProduct, noting_inputs


FUSED = AsyncBatchingConfig(fuse_projections=True)
PROMPTS = random_prompts(6, longest=30)


def generated(model, **kwargs) -> list[list[int]]:
    outputs = model.generate_batch(PROMPTS, generation_config=greedy(8), async_batching=FUSED, **kwargs)
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs.values()]


def groups_of(model) -> list[list[str]]:
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad(), noting_inputs(model) as groups:
        model(torch.tensor([[1, 2]]), use_cache=False)
    return [[names[linear] for linear in group] for group in groups]


class TestWhatIsJoined:
    def test_is_what_reads_the_same_tensor(self) -> None:
        assert groups_of(new_model("llama", num_hidden_layers=1)) == [
            [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"],
            ["model.layers.0.self_attn.o_proj"],
            [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")],
            ["model.layers.0.mlp.down_proj"],
            ["lm_head"],
        ]

    def test_is_not_what_has_hooks(self) -> None:
        model = new_model("llama", num_hidden_layers=1)
        model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
        assert not any("k_proj" in name for group in groups_of(model) for name in group)

    def test_is_not_what_is_tied_or_part_of_something_larger(self) -> None:
        model = new_model("llama", num_hidden_layers=1)
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight = attention.k_proj.weight
        together = torch.stack([model.model.layers[0].mlp.gate_proj.weight.data] * 2)
        model.model.layers[0].mlp.gate_proj.weight.data = together[0]
        assert all(len(group) == 1 for group in groups_of(model))

    def test_is_not_what_differs_in_type_or_bias(self) -> None:
        model = new_model("llama", num_hidden_layers=1)
        attention = model.model.layers[0].self_attn
        attention.k_proj.bias = nn.Parameter(torch.zeros(attention.k_proj.out_features))
        assert [len(group) for group in groups_of(model)[:3]] == [1, 1, 1]


def test_separating_never_holds_all_weights_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama", num_hidden_layers=4)
    with torch.no_grad(), noting_inputs(model) as groups:
        model(torch.tensor([[1, 2]]), use_cache=False)
    products = Products(model, groups)
    products.install()
    products.remove()
    joined = [weakref.ref(shared) for shared in products._shared]
    alive: list[int] = []
    separate = Shared.separate

    def counting(self) -> None:
        alive.append(sum(shared() is not None for shared in joined))
        separate(self)

    monkeypatch.setattr(Shared, "separate", counting)
    products.separate()
    assert alive == list(range(len(joined), 0, -1))


def stand_ins(model) -> list[Product | SharedProduct]:
    return [module for module in model.modules() if isinstance(module, Product | SharedProduct)]


def test_what_captured_steps_count_in_stays_where_it_is() -> None:
    model = new_model("llama", num_hidden_layers=1)
    with torch.no_grad(), noting_inputs(model) as groups:
        model(torch.tensor([[1, 2]]), use_cache=False)
    products, addresses = Products(model, groups), []
    for _ in range(2):
        products.install()
        addresses.append(
            [(p.shared if isinstance(p, SharedProduct) else p).counters.data_ptr() for p in stand_ins(model)]
        )
        taken = [torch.zeros(64, dtype=torch.int32) for _ in range(8)]
        products.remove()
    assert addresses[0] == addresses[1]
    assert len(taken) == 8


class TestGenerating:
    @pytest.mark.parametrize("settings", [{}, {"attention_bias": True}], ids=str)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_gives_the_same_tokens(self, family: str, settings: dict) -> None:
        model = new_model(family, **(settings if family == "llama" else {}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        expected = [reference(model, prompt, greedy(8)) for prompt in PROMPTS]
        assert generated(model) == expected

    def test_really_runs_on_joined_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = {Product: 0, SharedProduct: 0}
        for kind in calls:
            forward = kind.forward

            def counted(self, x, kind=kind, forward=forward):
                calls[kind] += 1
                return forward(self, x)

            monkeypatch.setattr(kind, "forward", counted)
        generated(new_model("llama"))
        assert calls[Product]
        assert calls[SharedProduct] == 2 * calls[Product], "q, k, v, gate, up of two layers to o, down and the head"

    def test_leaves_parameters_as_they_were(self) -> None:
        model, twin = new_model("llama"), new_model("llama")
        modules = list(model.modules())
        parameters = dict(model.named_parameters())
        generated(model)
        assert list(model.modules()) == modules
        for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert mine is parameters[name]
            assert torch.equal(mine, other)
            assert mine.is_contiguous()
            assert mine.untyped_storage().nbytes() == mine.numel() * mine.element_size()

    def test_in_inference_mode_leaves_parameters_that_can_be_trained(self) -> None:
        model = new_model("llama")
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        with (
            torch.inference_mode(),
            model.continuous_batching_context_manager(greedy(8), async_batching=FUSED) as manager,
            manager.update_weights(),
        ):
            model.load_state_dict(weights, assign=True)
        assert not any(parameter.is_inference() for parameter in model.parameters())
        model.requires_grad_(True)
        model(torch.tensor([PROMPTS[0]])).logits.sum().backward()
        assert generated(model) == [reference(shared_model("llama"), prompt, greedy(8)) for prompt in PROMPTS]

    def test_runs_a_model_that_was_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            model = new_model("llama")
        expected = [reference(shared_model("llama"), prompt, greedy(8)) for prompt in PROMPTS]
        assert generated(model) == expected
        assert generate_alone(model, PROMPTS[0], greedy(8)) == expected[0]

    def test_follows_weights_that_change_in_place_or_move_while_a_manager_is_kept(self, tmp_path) -> None:
        model = new_model("llama")
        assert generated(model, persistent_manager=True) == [
            reference(shared_model("llama"), prompt, greedy(8)) for prompt in PROMPTS
        ]
        for seed in (1, 2):
            other = new_model("llama", seed=seed)
            with torch.no_grad():
                for mine, its in zip(model.parameters(), other.parameters(), strict=True):
                    if seed == 1:
                        mine.copy_(its)
                    else:
                        mine.data = its.data.clone()
            expected = [reference(other, prompt, greedy(8)) for prompt in PROMPTS]
            assert generated(model, persistent_manager=True) == expected
        model.save_pretrained(tmp_path)
        saved = type(model).from_pretrained(tmp_path)
        assert [reference(saved, prompt, greedy(8)) for prompt in PROMPTS] == expected
        model.destroy_cached_continuous_batching_manager()

    def test_is_not_disturbed_by_a_thread_that_calls_the_model(self) -> None:
        model, refused, stop = new_model("llama"), [], threading.Event()
        ids = torch.tensor([[1, 2, 3, 4]])

        def intrude() -> None:
            while not stop.is_set():
                try:
                    model(ids)
                except RuntimeError as error:
                    refused.append(str(error))

        thread = threading.Thread(target=intrude)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            thread.start()
            answers = [generated(model) for _ in range(3)]
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(interval)
        assert answers == [[reference(shared_model("llama"), prompt, greedy(8)) for prompt in PROMPTS]] * 3
        assert any("generating with async_batching" in message for message in refused)

    def test_leaves_a_weight_that_moved_away_and_separates_the_rest(self) -> None:
        model = new_model("llama")
        generated(model, persistent_manager=True)
        attention = model.model.layers[0].self_attn
        attention.q_proj.weight.data = attention.q_proj.weight.data.clone()
        model.destroy_cached_continuous_batching_manager()
        for parameter in model.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()

    @pytest.mark.parametrize("layer", ["self_attn.v_proj", "mlp.down_proj"])
    def test_runs_hooks_that_come_while_a_manager_is_kept(self, layer: str) -> None:
        model = new_model("llama")
        before = generated(model, persistent_manager=True)
        hooked = model.get_submodule(f"model.layers.0.{layer}")
        handle = hooked.register_forward_hook(lambda module, given, output: output * 1.5)
        after = generated(model, persistent_manager=True)
        assert after == [generate_alone(model, prompt, greedy(8)) for prompt in PROMPTS]
        assert after != before
        handle.remove()
        assert generated(model, persistent_manager=True) == before
        model.destroy_cached_continuous_batching_manager()


def check_few_rows(device: str, dtype: torch.dtype) -> int:
    """The kernel against a product in float64, all that is not written poisoned; returns the number of cases."""
    from transformers_async_cb.linear import triton

    generator = torch.Generator().manual_seed(0)
    cases = 0
    for rows in (1, 2, 17, 32, 64):
        for columns, depth in ((64, 128), (192, 256), (64, 1024), (320, 384)):
            x = torch.randn(1, rows, depth, generator=generator).to(device, dtype)
            weight = torch.randn(columns, depth, generator=generator).to(device, dtype)
            counters = torch.zeros(columns // 16, dtype=torch.int32, device=device)
            bias = torch.randn(columns, generator=generator).to(device, dtype) if cases % 2 else None
            assert triton.suits(x, weight)
            expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            for _ in range(2):
                out = triton.few_rows(x, weight, bias, counters)
                error = (out.double() - expected).norm() / expected.norm()
                assert error < 4e-3, (rows, columns, depth, float(error))
                assert not counters.any(), "counters are left zero"
            cases += 1
    return cases


def test_few_rows_are_products_like_any_other() -> None:
    assert run_in_interpreter(__file__).split()[-1] == "checked:20"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_rows_on_the_gpu_are_products_like_any_other(dtype: torch.dtype) -> None:
    assert check_few_rows("cuda", dtype) == 20


if __name__ == "__main__":
    print(f"checked:{check_few_rows('cpu', torch.float16)}")
