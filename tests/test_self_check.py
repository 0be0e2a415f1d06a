"""A model that would answer otherwise on pages than `generate` does is found out before it runs."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from conftest import generate_alone, greedy, new_model, random_prompts, reference, shared_model

from transformers_async_cb import AsyncBatchingConfig, self_check
from transformers_async_cb import model as model_module
from transformers_async_cb.attention import reference as attention
from transformers_async_cb.matrix.small import small_model
from transformers_async_cb.model import ModelLoan
from transformers_async_cb.states import kept as kept_module


PROMPTS = random_prompts(3, longest=40)
STRICT = AsyncBatchingConfig(sequential_fallback=False)


@pytest.fixture(autouse=True)
def nothing_passed(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(self_check, "FILE", tmp_path / "folder" / "checked.json")


@pytest.fixture
def trials(monkeypatch) -> list[int]:
    """Grows by one with each trial."""
    made, on_pages = [], self_check._in_steps
    monkeypatch.setattr(self_check, "_in_steps", lambda *args: made.append(1) or on_pages(*args))
    return made


def generated(model, flag: AsyncBatchingConfig | bool = True) -> list[list[int]]:
    outputs = model.generate_batch(PROMPTS, generation_config=greedy(8), async_batching=flag)
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs.values()]


def forgetful(*wrong_windows: int):
    """Attention that sees only so many tokens where a window is asked for that is among these."""
    attend = attention.attend
    return lambda *args: attend(*args[:7], 3 if args[7] in wrong_windows else args[7], *args[8:])


@pytest.mark.parametrize("family, window", [("llama", 0), ("mistral", 16)])
def test_logits_that_differ_are_refused_with_a_sentence(family: str, window: int, monkeypatch) -> None:
    monkeypatch.setattr(attention, "attend", forgetful(window))
    with pytest.raises(ValueError, match="gets other logits on pages of async_batching than in generate, off by"):
        generated(new_model(family), STRICT)


def test_the_model_then_runs_one_sequence_at_a_time(monkeypatch, log) -> None:
    monkeypatch.setattr(attention, "attend", forgetful(0))
    model = new_model("llama")
    with log.at_level(logging.WARNING):
        assert generated(model) == [reference(shared_model("llama"), prompt, greedy(8)) for prompt in PROMPTS]
    assert "one sequence at a time" in log.text
    assert "gets other logits" in log.text


def test_a_model_is_checked_once_for_its_class_and_config(trials) -> None:
    for _ in range(2):
        generated(new_model("llama"), STRICT)
    assert len(trials) == 1
    generated(new_model("llama", intermediate_size=96), STRICT)
    generated(new_model("qwen3"), STRICT)
    assert len(trials) == 3


def test_it_can_be_switched_off(trials) -> None:
    generated(new_model("llama"), AsyncBatchingConfig(self_check=False))
    assert trials == []


def test_a_long_check_is_noted_for_other_processes(trials, monkeypatch) -> None:
    monkeypatch.setattr(self_check, "WORTH_NOTING", 0.0)
    generated(new_model("llama"), STRICT)
    assert len(json.loads(self_check.FILE.read_text())) == 1
    monkeypatch.setattr(self_check, "_passed", set())
    generated(new_model("llama"), STRICT)
    assert len(trials) == 1


def test_a_file_that_cannot_be_read_or_written_changes_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(self_check, "WORTH_NOTING", 0.0)
    self_check.FILE.parent.mkdir()
    self_check.FILE.write_text("{")
    generated(new_model("llama"), STRICT)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(self_check, "FILE", tmp_path / "file" / "checked.json")
    generated(new_model("qwen3"), STRICT)


def test_the_trial_goes_beyond_the_window_where_that_is_little_work(monkeypatch) -> None:
    def length(family: str, **changes: int) -> int:
        loan = ModelLoan(new_model(family, **changes))
        loan.borrow()
        return self_check._prompt_length(loan, loan.probe())

    assert length("mistral", sliding_window=40) == 43
    monkeypatch.setitem(self_check._MOST_WORK, "cpu", 1.0)
    assert length("mistral", sliding_window=40) == self_check.SHORTEST
    assert length("gpt2", n_positions=20) == 8


def test_a_model_in_training_is_left_so() -> None:
    model = new_model("gpt2").train()
    assert generated(model, STRICT) == [generate_alone(shared_model("gpt2"), prompt, greedy(8)) for prompt in PROMPTS]
    assert model.training


class TestHalfPrecision:
    """What rounding does is told from what is wrong by a second trial in float32."""

    @pytest.fixture(autouse=True)
    def any_rounding_is_too_much(self, monkeypatch) -> None:
        for module, name in (
            (self_check, "_CLOSE_ROUNDED"), (model_module, "CLOSE_ROUNDED"), (kept_module, "CLOSE_ROUNDED"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, -1.0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", ["llama", "gpt_oss", "qwen3_next", "mamba2"])
    def test_a_model_that_is_right_in_float32_runs_batched(self, kind, dtype, trials) -> None:
        model = small_model(kind).to(dtype)
        before = {name: (tensor, tensor.data_ptr(), tensor.dtype) for name, tensor in tensors_of(model)}
        values = {name: tensor.clone() for name, tensor in tensors_of(model)}
        generated(model, STRICT)
        assert len(trials) == 2
        assert {name: (tensor, tensor.data_ptr(), tensor.dtype) for name, tensor in tensors_of(model)} == before
        assert all(torch.equal(tensor, values[name]) for name, tensor in tensors_of(model))
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    def test_one_that_is_wrong_is_refused(self, trials, monkeypatch) -> None:
        monkeypatch.setattr(attention, "attend", forgetful(0))
        with pytest.raises(ValueError, match="gets other logits on pages"):
            generated(new_model("llama").bfloat16(), STRICT)
        assert len(trials) == 2

    def test_one_that_cannot_be_cast_is_refused(self, trials) -> None:
        model = new_model("llama").bfloat16()
        model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
        with pytest.raises(ValueError, match="sequences that are packed would be mixed up"):
            generated(model, STRICT)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_the_second_trial_does_not_use_autocast(self, trials) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            generated(new_model("llama"), STRICT)
        assert len(trials) == 2


def test_experts_that_rounding_chooses_are_no_reason_to_refuse(trials) -> None:
    """Routers that find all experts nearly alike, and experts that are not."""
    model = new_model("gpt_oss", num_hidden_layers=8, num_local_experts=32, num_experts_per_tok=4)
    for layer in model.model.layers:
        layer.mlp.router.weight.data *= 1e-4
        layer.mlp.router.bias.data.zero_()
    generated(model.bfloat16(), STRICT)
    assert len(trials) == 2


def tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def test_tokens_that_a_model_rules_out_are_compared_too() -> None:
    model = new_model("llama")
    bias = torch.zeros(model.config.vocab_size)
    bias[::3] = float("-inf")
    model.lm_head.bias = torch.nn.Parameter(bias)
    assert generated(model, STRICT) == [generate_alone(model, prompt, greedy(8)) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "found, expected, off",
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3.0, -math.inf, 4.5], [3.0, -math.inf, 4.0], 0.1),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([-math.inf, 1.0], [1.0, 1.0], math.inf),
        ([1.0, 1.0], [-math.inf, 1.0], math.inf),
        ([1.0, 0.0], [0.0, 0.0], math.inf),
    ],
)
def test_how_far_logits_are_off(found: list[float], expected: list[float], off: float) -> None:
    assert model_module.difference(torch.tensor(found), torch.tensor(expected)) == pytest.approx(off)
