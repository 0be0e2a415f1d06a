"""Layers are compiled as one, or run as they are written; steps are padded to sizes that are few."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from conftest import VOCABULARY, greedy, new_model, random_prompts, reference, shared_model
from torch._dynamo.utils import counters
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.attention import reference as reference_backend
from transformers_async_cb.runner import Runner, row_buckets, token_buckets


PROMPTS = random_prompts(12, longest=60)
COMPILED = AsyncBatchingConfig(compile_layers=True, fuse_projections=True, self_check=False)
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def generated(model, **kwargs) -> list[list[int]]:
    outputs = model.generate_batch(PROMPTS, generation_config=greedy(12), async_batching=COMPILED, **kwargs)
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs.values()]


class TestCompiledLayers:
    @needs_a_compiler
    def test_are_one_graph_for_all_layers_and_steps_that_reads_the_cache_itself(self, monkeypatch) -> None:
        model = new_model("llama", num_hidden_layers=3)
        expected = [reference(model, prompt, greedy(12)) for prompt in PROMPTS]
        written, made = set(), set()
        write_pages, init = reference_backend.write_pages, Runner.__init__

        def noting_pages(key, value, key_pages, value_pages, step) -> None:
            written.update((key_pages.data_ptr(), value_pages.data_ptr()))
            write_pages(key, value, key_pages, value_pages, step)

        def noting_caches(self, *args) -> None:
            init(self, *args)
            made.update(pages.data_ptr() for layer in self.layers.values() for pages in layer[:2])

        monkeypatch.setattr(reference_backend, "write_pages", noting_pages)
        monkeypatch.setattr(Runner, "__init__", noting_caches)
        before = counters["stats"]["unique_graphs"]
        assert generated(model) == expected
        assert counters["stats"]["unique_graphs"] - before == 3, "layers, rotary embedding, last norm"
        assert written == made, "no copy of the cache was written to"
        assert len(made) == 6

    @needs_a_compiler
    def test_are_a_graph_for_each_kind_of_layer_where_pages_are_shared_by_kinds(self, monkeypatch) -> None:
        config = Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=32, num_hidden_layers=12, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=512,
            layer_types=2 * (["sliding_attention"] * 5 + ["full_attention"]), initializer_range=0.3,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).eval()
        expected = [reference(model, prompt, greedy(12)) for prompt in PROMPTS]
        before = counters["stats"]["unique_graphs"]
        assert generated(model) == expected
        assert counters["stats"]["unique_graphs"] - before == 5, "two layers and rotary embeddings, last norm"

    @needs_a_compiler
    def test_are_compiled_for_more_models_than_torch_would_by_itself(self, log) -> None:
        torch._dynamo.reset()
        limit = torch._dynamo.config.recompile_limit
        prompt, before = [1, 2, 3], counters["stats"]["unique_graphs"]
        for i in range(limit + 1):
            model = new_model("llama", num_hidden_layers=1, hidden_size=16 * (i + 1), intermediate_size=16)
            outputs = model.generate_batch([prompt], generation_config=greedy(3), async_batching=COMPILED)
            assert outputs["req_0"].generated_tokens == reference(model, prompt, greedy(3))
        assert counters["stats"]["unique_graphs"] - before > limit
        assert not [record for record in log.records if "do not compile" in record.getMessage()]

    def test_run_as_they_are_written_if_they_do_not_compile(self, monkeypatch, log) -> None:
        model = new_model("llama")
        expected = [reference(shared_model("llama"), prompt, greedy(12)) for prompt in PROMPTS]
        forward = type(model.model.layers[0].mlp).forward

        def breaking(self, x):
            torch._dynamo.graph_break()
            return forward(self, x)

        monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", breaking)
        torch._dynamo.reset()  # what another test compiled
        with log.at_level(logging.WARNING):
            assert generated(model) == expected
        warnings = {record.getMessage() for record in log.records if "do not compile" in record.getMessage()}
        assert len(warnings) == 1
        assert "LlamaForCausalLM" in warnings.pop()
        assert all(layer._compiled_call_impl is None for layer in model.model.layers)


@pytest.mark.parametrize("largest", [1, 2, 5, 31, 32, 256, 1000, 1024])
def test_rows_are_padded_by_at_most_eight_or_an_eighth(largest: int) -> None:
    sizes = row_buckets(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    for rows in range(1, largest + 1):
        padded = next(size for size in sizes if size >= rows)
        assert padded - rows <= max(7, rows / 8)


@pytest.mark.parametrize("largest", [1, 48, 64, 100, 2048, 5000])
def test_tokens_are_padded_by_at_most_an_eighth_from_64_on(largest: int) -> None:
    sizes = token_buckets(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    for tokens in range(64, largest + 1):
        padded = next(size for size in sizes if size >= tokens)
        assert padded - tokens <= tokens / 8
