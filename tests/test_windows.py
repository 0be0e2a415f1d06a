"""Layers that look back on a window or a chunk: pages go back while their request runs, and no token changes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from conftest import POSITIONS, VOCABULARY, batching, greedy, new_model, random_prompts, reference, shared_model
from transformers import PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.engine import Engine
from transformers_async_cb.offload import HostPages
from transformers_async_cb.output import AsyncGenerationOutput
from transformers_async_cb.scheduler import Scheduler


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

WINDOW, PAGE_SIZE, TOKEN_BUDGET = 24, 4, 20

_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": POSITIONS, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_LAYERS = ["sliding_attention"] * 3 + ["full_attention"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"num_hidden_layers": 2, "sliding_window": WINDOW}),
    "gemma3": ("Gemma3Text", {"num_hidden_layers": 4, "sliding_window": WINDOW, "layer_types": _LAYERS}),
    "gpt-oss": ("GptOss", {"num_hidden_layers": 2, "sliding_window": WINDOW, "num_local_experts": 4}),
    "llama4": ("Llama4Text", {
        "num_hidden_layers": 4, "attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 96,
    }),
}  # fmt: skip
MODELS = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def windowed(name: str, device: str = "cpu") -> PreTrainedModel:
    kind, settings = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**_SMALL | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model.to(device).eval()


def run(
    name: str, prompts: list[list[int]], new_tokens: int, device: str = "cpu", overlap: bool = True, **sizes: Any
) -> tuple[list[AsyncGenerationOutput], Engine]:
    """Results in the order of the prompts, of an engine that fills pages with NaN when nobody holds them."""
    manager = windowed(name, device).init_continuous_batching(
        greedy(new_tokens),
        batching(**{"page_size": PAGE_SIZE, "max_batch_tokens": TOKEN_BUDGET, "num_blocks": 400} | sizes),
        async_batching=AsyncBatchingConfig(overlap=overlap, debug=True, self_check=False),
    )
    names = manager.add_requests(prompts)
    manager.start()
    engine = manager._engine
    manager.stop()
    engine.scheduler.check_books()
    outputs = {output.request_id: output for output in manager}
    return [outputs[name] for name in names], engine


def answers(name: str, prompts: list[list[int]], new_tokens: int, device: str = "cpu") -> list[list[int]]:
    return [reference(windowed(name, device), prompt, greedy(new_tokens)) for prompt in prompts]


def tokens(outputs: list[AsyncGenerationOutput]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


@MODELS
class TestTokensEqualGenerates:
    @DEVICES
    @OVERLAP
    def test_beyond_the_window_with_prompts_in_chunks(self, name: str, overlap: bool, device: str) -> None:
        prompts = random_prompts(6, longest=90)
        outputs, _ = run(name, prompts, 30, device, overlap)
        assert tokens(outputs) == answers(name, prompts, 30, device)

    @OVERLAP
    def test_when_pages_are_short(self, name: str, overlap: bool) -> None:
        prompts = random_prompts(8, longest=20, seed=1)
        outputs, engine = run(name, prompts, 50, overlap=overlap, num_blocks=18)
        assert tokens(outputs) == answers(name, prompts, 50)
        assert engine.scheduler.preemptions > 0

    def test_when_the_pool_holds_just_the_longest_request(self, name: str) -> None:
        prompts = random_prompts(4, longest=70, seed=2)
        longest = max(map(len, prompts)) + 40
        layout = run(name, [[1]], 1)[1].settings.layout
        blocks = next(n for n in range(1, 100) if (layout.longest(layout.pages_for(4 * n)) or longest) >= longest - 1)
        assert blocks * PAGE_SIZE < longest, "no window is needed for that"
        outputs, _ = run(name, prompts, 40, num_blocks=blocks)
        assert tokens(outputs) == answers(name, prompts, 40)

    def test_when_preempted_requests_wait_on_the_host(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(HostPages, "cheaper", True)
        prompts = random_prompts(8, longest=20, seed=1)
        outputs, engine = run(name, prompts, 50, num_blocks=18, cpu_offload_space=1e-3)
        assert tokens(outputs) == answers(name, prompts, 50)
        assert engine.scheduler.restored > 0

    def test_when_requests_begin_alike(self, name: str) -> None:
        """A conversation goes on, and one goes another way: long before, where the windows may be gone."""
        first = random_prompts(1, longest=90, shortest=90)[0]
        manager = windowed(name).init_continuous_batching(
            greedy(30), batching(page_size=PAGE_SIZE), async_batching=AsyncBatchingConfig(debug=True)
        )
        manager.start()
        answer = manager.get_result(manager.add_request(first)).generated_tokens
        prompts = [[*first, *answer, 1, 2, 3], [*first[:60], 5], [*first, *answer[:20], 7]]
        outputs, found = [], [0]
        for prompt in prompts:
            outputs.append(manager.get_result(manager.add_request(prompt)))
            found.append(manager.metrics().found - sum(found))
        manager.stop()
        assert tokens(outputs) == answers(name, prompts, 30)
        found = found[1:]
        assert found[0] >= len(first) + len(answer) - 2 * 3 * PAGE_SIZE, "what the next turn needs was kept"
        assert found[1] >= 60 - 2 * 3 * PAGE_SIZE, "prompts were kept as long as there was room"

    def test_when_sequences_of_one_prompt_share_it(self, name: str) -> None:
        """Some find a row only when the first has left the prompt's window behind."""
        sampled = []
        for rows in (2, 16):
            manager = windowed(name).init_continuous_batching(
                greedy(34), batching(page_size=PAGE_SIZE, max_requests_per_batch=rows, max_batch_tokens=TOKEN_BUDGET),
                async_batching=AsyncBatchingConfig(debug=True, self_check=False),
            )  # fmt: skip
            for i, prompt in enumerate(random_prompts(2, longest=70, shortest=30, seed=3)):
                manager.add_request(prompt, num_return_sequences=3, do_sample=True, seed=i)
            manager.start()
            manager.stop()
            sampled.append({output.request_id: tuple(output.generated_tokens) for output in manager})
        assert sampled[0] == sampled[1]
        assert len(set(sampled[0].values())) == 6


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Pages that rows hold in each group, after each plan."""
    noted, plan = [], Scheduler.plan

    def noting(self: Scheduler) -> Any:
        planned = plan(self)
        noted.append((self.tables.end - self.tables.first).sum(1).tolist())
        return planned

    monkeypatch.setattr(Scheduler, "plan", noting)
    return noted


class TestPagesOutsideTheWindow:
    @MODELS
    def test_go_back_while_the_request_runs(self, name: str, held: list[list[int]]) -> None:
        prompt = random_prompts(1, longest=300, shortest=300)[0]
        _, engine = run(name, [prompt], 100)
        in_flight = 2 * TOKEN_BUDGET
        for group, pages in zip(engine.settings.layout.groups, zip(*held, strict=True), strict=True):
            if group.keeps_all:
                assert max(pages) == -(-399 // group.page_size)
            else:
                most = -(-(WINDOW + engine.settings.layout.grain + in_flight) // group.page_size) + 1
                assert WINDOW // group.page_size <= max(pages) <= most

    def test_leave_room_for_several_times_as_many_tokens(self) -> None:
        prompts = random_prompts(16, longest=90, shortest=80, seed=4)
        outputs, engine = run("gemma3", prompts, 60, num_blocks=120, max_batch_tokens=60)
        room = engine.settings.pages * engine.settings.layout.page_bytes
        assert engine.settings.layout.capacity(engine.settings.pages, 150) > 2 * 120 * PAGE_SIZE
        a_token = 4 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dimensions, bytes
        assert room <= 1.1 * 120 * PAGE_SIZE * a_token, "of the memory that num_blocks stands for"
        assert len(tokens(outputs)) == 16

    def test_cost_a_model_without_windows_nothing(self) -> None:
        manager = shared_model("llama").init_continuous_batching(greedy(4), async_batching=True)
        manager.warmup()
        engine = manager._engine
        manager.stop()
        assert len(engine.settings.layout.groups) == len(engine.runner.page_tables) == 1
        assert not engine.scheduler.tables.forgets
        assert [layer.key_pages.is_contiguous() for layer in engine.runner.layers.values()] == [True] * 2

    def test_are_none_where_no_request_outgrows_it(self) -> None:
        model = new_model("mistral", sliding_window=POSITIONS)
        manager = model.init_continuous_batching(greedy(4), async_batching=True)
        manager.warmup()
        groups = manager._engine.settings.layout.groups
        manager.stop()
        assert [group.keeps_all for group in groups] == [True]


@MODELS
def test_a_request_that_does_not_fit_ends_with_the_numbers(name: str) -> None:
    prompts = [random_prompts(1, longest=60, shortest=60)[0], [1, 2, 3]]
    outputs, _ = run(name, prompts, 10, num_blocks=3)
    assert "needs" in outputs[0].error
    assert "the cache has" in outputs[0].error
    assert outputs[1].generated_tokens == answers(name, prompts[1:], 10)[0]


def test_the_log_says_how_many_tokens_short_and_long_requests_have_room_for() -> None:
    manager = windowed("gemma3").init_continuous_batching(
        greedy(4), batching(num_blocks=120, page_size=4), async_batching=True
    )
    manager.warmup()
    manager.stop()
    said = {choice.name: choice.value for choice in manager.choices}
    assert said["pages"] == f"of 12 tokens or 4 tokens in layers with a window of {WINDOW}"
    assert said["cache"].startswith("1,")
    assert f"tokens in requests of {POSITIONS}, " in said["cache"]
    assert f"in those of {WINDOW}, " in said["cache"]
