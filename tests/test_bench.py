"""What the benchmark computes with, by hand and against one another."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import VOCABULARY, new_model
from transformers import GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from transformers_async_cb import bench
from transformers_async_cb.bench import ModelCost, Rates, Workload, least_seconds
from transformers_async_cb.bench.kernels import Span, summarize
from transformers_async_cb.bench.limit import LayerCost
from transformers_async_cb.groups import PageGroup


READING, COMPUTING = Rates(bytes=1, flops=1e30), Rates(bytes=1e30, flops=1)


class TestKernelTimes:
    def test_add_up_by_name_and_count_the_time_in_which_any_ran(self) -> None:
        spans = [Span("b", 5_000, 7_000), Span("a", 0, 1_000), Span("a", 9_000, 10_000), Span("c", 6_000, 6_500)]
        times = summarize(spans)
        assert [(kernel.name, kernel.calls, kernel.ms) for kernel in times.kernels] == [
            ("a", 2, 2.0), ("b", 1, 2.0), ("c", 1, 0.5),
        ]  # fmt: skip
        assert sum(kernel.share for kernel in times.kernels) == pytest.approx(1)
        assert times.ms == 10.0
        assert times.busy == pytest.approx(0.4), "what overlaps counts once"

    def test_of_nothing_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="no kernel ran"):
            summarize([])


class TestTheLimit:
    def test_is_what_a_hand_computes(self) -> None:
        # q and o 64 x 64, k and v 64 x 32, three of 64 x 128, two norms; a last norm; a head for 97 tokens
        layers, head = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64, 97 * 64
        key_and_value, look = 2 * (16 + 16) * 4, 2 * 4 * (16 + 16)  # 2 heads in float32; 4 query heads
        cost = ModelCost.of(new_model("llama"))
        workload = Workload(2, (3, 3), (2, 2))
        prompts = 6 * 2 * layers + 2 * 2 * head + 2 * 2 * (1 + 2 + 3) * look  # 2 requests in 2 layers
        second = 2 * 2 * (layers + head) + 2 * 2 * 4 * look
        assert least_seconds(cost, COMPUTING, workload) == prompts + second
        weights = 4 * (layers + head)
        assert least_seconds(cost, READING, workload) == weights + (weights + 2 * 2 * 4 * key_and_value)

    def test_ends_each_request_at_its_own(self) -> None:
        cost = ModelCost.of(new_model("llama"))
        workload = Workload(3, (2, 9), (1, 5))
        lengths, limits = [len(prompt) for prompt in workload.prompts(VOCABULARY)], workload.limits()
        assert len(set(limits)) > 1
        looks = sum(n + step - 1 for n, limit in zip(lengths, limits, strict=True) for step in range(2, limit + 1))
        assert least_seconds(cost, READING, workload) == max(limits) * cost.weight_bytes + 2 * looks * 256

    def test_reads_no_more_than_a_window(self) -> None:
        cost = ModelCost.of(new_model("mistral"))  # of 16 tokens
        assert least_seconds(cost, READING, Workload(1, (40, 40), (2, 2))) == 2 * cost.weight_bytes + 2 * 16 * 256
        full = ModelCost.of(new_model("mistral", sliding_window=None))
        assert least_seconds(full, READING, Workload(1, (40, 40), (2, 2))) == 2 * cost.weight_bytes + 2 * 41 * 256
        looks = 1 + 2 + 3 + sum(min(n, 16) for n in range(4, 41))
        prompt = 40 * cost.token_flops + cost.head_flops + 2 * 256 * looks
        assert least_seconds(cost, COMPUTING, Workload(1, (40, 40), (1, 1))) == prompt

    def test_reads_no_more_than_a_chunk(self) -> None:
        layer = LayerCost(bytes=256, flops=0, kept=PageGroup(1, chunk=16))
        cost = ModelCost(weight_bytes=0, token_flops=0, head_flops=0, layers=Counter([layer]))
        for context, looks in ((15, 16), (16, 1), (40, 9)):  # of the token that comes after those
            assert least_seconds(cost, READING, Workload(1, (context, context), (2, 2))) == looks * 256

    def test_counts_a_head_that_is_the_embedding_once_and_no_table_of_positions(self) -> None:
        model: GPT2LMHeadModel = new_model("gpt2")
        everything = sum(parameter.nbytes for parameter in model.parameters())
        assert ModelCost.of(model).weight_bytes == everything - model.transformer.wpe.weight.nbytes

    def test_counts_the_experts_that_tokens_choose(self) -> None:
        config = Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        )  # fmt: skip
        cost = ModelCost.of(Qwen3MoeForCausalLM(config).eval())
        experts = 2 * 8 * 3 * 64 * 32  # layers, experts, products of 64 x 32
        assert (cost.expert_bytes, cost.expert_share) == (4 * experts, 0.25)
        others = cost.weight_bytes // 4 - VOCABULARY * 64
        assert cost.token_flops == 2 * (others + experts // 4)
        one = least_seconds(cost, READING, Workload(1, (1, 1), (1, 1)))
        assert one == cost.weight_bytes + cost.expert_bytes / 4
        many = least_seconds(cost, READING, Workload(1, (500, 500), (1, 1)))
        assert many == pytest.approx(cost.weight_bytes + cost.expert_bytes)

    def test_is_not_known_of_a_model_that_is_not(self) -> None:
        model = new_model("llama")
        model.model.layers[0].self_attn.is_causal = False
        assert bench.limit_seconds(model, Workload(1, (4, 4), (4, 4)), READING) is None

    def test_leaves_the_model_as_it_was(self) -> None:
        model = new_model("llama")
        implementation = model.config._attn_implementation
        assert bench.limit_seconds(model, Workload(1, (4, 4), (4, 4)), READING) > 0
        assert model.config._attn_implementation == implementation


class TestEngines:
    def test_generate_gives_each_request_its_tokens_which_are_ours(self) -> None:
        model = new_model("llama")
        workload = Workload(7, (3, 30), (2, 9))
        prompts, limits = workload.prompts(VOCABULARY), workload.limits()
        answers = {}
        for engine in ("ours", "generate"):
            with bench.ENGINES[engine](model, workload, 3) as generate:
                answers[engine] = generate(prompts, limits)
        assert [len(answer) for answer in answers["generate"]] == limits
        assert answers["generate"] == answers["ours"]

    def test_of_ours_say_what_a_step_takes(self) -> None:
        result = bench.measure(new_model("llama"), "ours", Workload(3, (4, 4), (6, 6)), repeats=2)
        assert result.steps == 6
        assert result.step_ms > 0
        assert result.host_ms > 0
        assert 0 < result.gpu_active <= 1
        assert result.recompiled == 0

    def test_of_others_do_not(self) -> None:
        result = bench.measure(new_model("llama"), "generate", Workload(3, (4, 4), (6, 6)), repeats=1)
        assert result.tokens == 18
        assert (result.steps, result.step_ms, result.host_ms, result.gpu_active) == (None,) * 4

    def test_count_what_is_compiled_after_the_first_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = new_model("llama")
        generate, runs = model.generate, []
        add = torch.compile(torch.add, backend="eager", dynamic=False)

        def compile_anew(*args, **kwargs):
            runs.append(add(torch.zeros(2 + len(runs)), 1))
            return generate(*args, **kwargs)

        monkeypatch.setattr(model, "generate", compile_anew)
        assert bench.measure(model, "generate", Workload(1, (4, 4), (2, 2)), repeats=2).recompiled == 2


class TestTheHost:
    def test_is_measured_beside_a_busy_thread_too(self) -> None:
        assert 0 < bench.measure_host(3, steps=400, busy=True) < 1000

    def test_is_measured_while_requests_join(self) -> None:
        assert 0 < bench.measure_admission(running=2, added=20, repeats=1) < 1000
