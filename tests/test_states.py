"""Models that keep a state of each sequence run batched, and answer what `generate` does."""

from __future__ import annotations

import functools
import logging
import random

import pytest
import torch
from conftest import batching, generate_alone, greedy, reference, run_in_interpreter
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb import AsyncBatchingConfig, self_check, settings
from transformers_async_cb.engine import Engine
from transformers_async_cb.matrix.small import FIRST_ORDINARY, VOCABULARY, small_model
from transformers_async_cb.model import ModelLoan
from transformers_async_cb.settings import Mode
from transformers_async_cb.states import Kept, StateRunner


# What each keeps: states alone, in transformers' cache and in one of the model's own; states that it cannot go on from
# with several tokens; layers of states and layers of keys, layers of both, convolutions, a cache of the model's own.
ALONE = ("mamba2", "mamba", "xlstm")
HYBRIDS = ("qwen3_next", "jamba", "falcon_h1", "lfm2", "minimax")
WHOLE = ("mamba", "jamba")

OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

_draw = random.Random(0)
PROMPTS = [
    [_draw.randrange(FIRST_ORDINARY, VOCABULARY) for _ in range(length)] for length in (3, 40, 1, 17, 17, 29, 2, 8)
]


@functools.cache
def model_of(family: str, device: str = "cpu") -> PreTrainedModel:
    return small_model(family).to(device)


def answers(
    model: PreTrainedModel, asked: list[dict], overlap: bool = True, config: GenerationConfig | None = None, **sizes
) -> tuple[list[GenerationOutput], Engine]:
    """The results of `asked`, keyword arguments of `add_request`, and the engine, whose books balance."""
    manager = model.init_continuous_batching(
        config or greedy(12), batching(**sizes), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
    )
    ids = manager.sequence_ids([manager.add_request(**request) for request in asked])
    manager.start()
    engine = manager._engine
    manager.stop()
    outputs = {output.request_id: output for output in manager}
    assert sorted(outputs) == sorted(ids)
    engine.scheduler.check_books()
    return [outputs[i] for i in ids], engine


def tokens(outputs: list[GenerationOutput]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


class TestTokens:
    @DEVICES
    @OVERLAP
    @pytest.mark.parametrize("family", ALONE + HYBRIDS)
    def test_are_those_of_generate_while_requests_come_and_go(self, family: str, overlap: bool, device: str) -> None:
        """Each wants another number of them, so rows are left and taken again while others decode."""
        model = model_of(family, device)
        limits = [4 + 5 * i % 11 for i in range(len(PROMPTS))]
        asked = [{"input_ids": p, "max_new_tokens": n} for p, n in zip(PROMPTS, limits, strict=True)]
        outputs, engine = answers(model, asked, overlap, max_requests_per_batch=4, max_batch_tokens=16)
        assert tokens(outputs) == [reference(model, p, greedy(n)) for p, n in zip(PROMPTS, limits, strict=True)]
        assert engine.settings.mode is (Mode.STATES if family in ALONE else Mode.HYBRID)
        assert bool(engine.settings.whole_prompts) is (family in WHOLE)

    @pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
    def test_of_steps_that_are_padded_are_the_same(self, family: str, monkeypatch) -> None:
        """As on CUDA, where steps that decode are captured in few sizes."""
        init = StateRunner.__init__

        def padding(runner: StateRunner, *args: object) -> None:
            init(runner, *args)
            runner.pads = True

        monkeypatch.setattr(StateRunner, "__init__", padding)
        model = model_of(family)
        outputs, _ = answers(model, [{"input_ids": prompt} for prompt in PROMPTS], max_requests_per_batch=5)
        assert tokens(outputs) == [reference(model, prompt, greedy(12)) for prompt in PROMPTS]

    def test_on_our_kernels_are_the_same(self) -> None:
        """Steps that decode, prompts of one token and of several, side by side and alone: in Triton's interpreter."""
        assert run_in_interpreter(__file__).split()[-1] == "hybrid"

    @DEVICES
    @OVERLAP
    def test_after_an_end_or_a_cancelled_neighbour_are_others_own(self, overlap: bool, device: str) -> None:
        model = model_of("qwen3_next", device)
        expected = [reference(model, prompt, greedy(30)) for prompt in PROMPTS]
        eos = [expected[i][5 + i] for i in range(3)]
        manager = model.init_continuous_batching(
            greedy(30, eos), batching(max_requests_per_batch=3), async_batching=AsyncBatchingConfig(overlap=overlap)
        )
        ids = manager.add_requests(PROMPTS)
        unwanted = manager.add_request(PROMPTS[1], max_new_tokens=400, eos_token_id=-1, streaming=True, priority=1)
        manager.start()
        next(iter(manager.request_id_iter(unwanted)))
        manager.cancel_request(unwanted)
        outputs = {i: manager.get_result(i, timeout=60) for i in ids}
        manager.stop()
        for i, answer in zip(ids, expected, strict=True):
            end = next((at + 1 for at, token in enumerate(answer) if token in eos), len(answer))
            assert outputs[i].status == RequestStatus.FINISHED
            assert outputs[i].generated_tokens == answer[:end]

    @DEVICES
    def test_of_requests_that_find_no_room_are_computed_again(self, device: str) -> None:
        model = model_of("qwen3_next", device)
        outputs, engine = answers(
            model, [{"input_ids": prompt} for prompt in PROMPTS], config=greedy(40), num_blocks=9, page_size=16
        )
        assert tokens(outputs) == [reference(model, prompt, greedy(40)) for prompt in PROMPTS]
        assert engine.scheduler.preemptions > 0

    @DEVICES
    @pytest.mark.parametrize("family", ["mamba2", "qwen3_next", "jamba"])
    def test_of_the_sequences_of_a_request_are_those_of_requests_alone(self, family: str, device: str) -> None:
        model, config = model_of(family, device), GenerationConfig(do_sample=True, max_new_tokens=16, pad_token_id=0)
        together, engine = answers(
            model,
            [{"input_ids": p, "num_return_sequences": 3, "request_id": f"r{i}"} for i, p in enumerate(PROMPTS)],
            config=config, max_requests_per_batch=8, max_batch_tokens=24, page_size=4, num_blocks=20, seed=3,
        )  # fmt: skip
        alone, _ = answers(
            model,
            [{"input_ids": output.prompt_ids, "request_id": output.request_id} for output in together],
            config=config, seed=3,
        )  # fmt: skip
        assert engine.scheduler.preemptions > 0, "the pool was too large to tell"
        assert tokens(together) == tokens(alone)
        assert len({tuple(answer) for answer in tokens(together)}) > 2 * len(PROMPTS)

    @pytest.mark.parametrize("family", ["zamba2", "nemotron_h"])
    def test_of_sequences_are_as_likely_as_alone_where_one_token_is_computed_otherwise_than_several(
        self, family: str
    ) -> None:
        """Such a prompt is not cut before its last token."""
        model, sampled = model_of(family), GenerationConfig(do_sample=True, max_new_tokens=2, pad_token_id=0)
        asked = [{"input_ids": prompt, "logprobs": 0, "seed": 0} for prompt in PROMPTS]
        alone, _ = answers(model, asked, config=sampled)
        together, _ = answers(model, [request | {"num_return_sequences": 2} for request in asked], config=sampled)
        for one, other in zip(alone, together[::2], strict=True):
            assert one.generated_tokens == other.generated_tokens
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)

    def test_come_with_log_probabilities(self) -> None:
        model = model_of("qwen3_next")
        asked = [{"input_ids": prompt, "logprobs": 0, "prompt_logprobs": 0} for prompt in PROMPTS]
        for output in answers(model, asked, max_batch_tokens=16)[0]:
            ids = torch.tensor([output.prompt_ids + output.generated_tokens])
            with torch.no_grad():
                expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found = torch.tensor(output.prompt_logprobs + output.logprobs)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_of_several_answers_is_computed_once(monkeypatch) -> None:
    computed = []
    stage = StateRunner.stage
    monkeypatch.setattr(
        StateRunner, "stage", lambda self, plan, *args: computed.append(plan.tokens) or stage(self, plan, *args)
    )
    model, sampled = model_of("qwen3_next"), GenerationConfig(do_sample=True, max_new_tokens=1, pad_token_id=0)
    answers(model, [{"input_ids": PROMPTS[1], "num_return_sequences": 4}], config=sampled)
    assert sum(computed[-2:]) == len(PROMPTS[1]) + 3


def test_rows_side_by_side_are_written_in_place_and_others_are_not(monkeypatch) -> None:
    rows, forward = [], StateRunner._forward
    monkeypatch.setattr(
        StateRunner, "_forward", lambda self, key, *args: rows.extend(key.groups) or forward(self, key, *args)
    )
    model = model_of("mamba2")
    limits = [4 + 5 * i % 11 for i in range(len(PROMPTS))]
    asked = [{"input_ids": p, "max_new_tokens": n} for p, n in zip(PROMPTS, limits, strict=True)]
    answers(model, asked)
    assert {(group.row >= 0, group.begins) for group in rows if group.sequences > 1} >= {(True, False), (False, False)}


def test_memory_decides_how_many_rows_there_are(monkeypatch) -> None:
    """Half of it is for states, of which a step may need a copy."""
    model = model_of("mamba2")
    loan = ModelLoan(model)
    loan.paged = False
    loan.borrow()
    of_a_row = Kept(loan).bytes
    loan.give_back()
    monkeypatch.setattr(settings, "_free_bytes", lambda *_: 13 * of_a_row)
    manager = model.init_continuous_batching(greedy(4), async_batching=True)
    manager.start()
    tables, choices = manager._engine.runner.tables_of_states, {c.name: c.value for c in manager.choices}
    manager.add_requests(PROMPTS)
    results = [manager.get_result(timeout=60) for _ in PROMPTS]
    manager.stop()
    assert sum(table.nbytes for table in tables) == (3 + 1) * of_a_row
    assert choices["sequences"] == "a state for each row"
    assert choices["requests at once"] == "up to 3"
    assert sorted(tokens(results)) == sorted(reference(model, prompt, greedy(4)) for prompt in PROMPTS)


def test_memory_is_given_back_in_a_sleep_and_requests_go_on_after_it() -> None:
    model = model_of("qwen3_next")
    manager = model.init_continuous_batching(greedy(60), async_batching=True)
    manager.start()
    ids = manager.add_requests(PROMPTS, streaming=True)
    next(iter(manager.request_id_iter(ids[0])))
    manager.sleep()
    assert manager._engine.runner.tables_of_states == []
    manager.wake()
    outputs = {}
    while len(outputs) < len(ids):
        output = manager.get_result(timeout=60)
        if output.is_finished():
            outputs[output.request_id] = output
    manager.stop()
    expected = {i: reference(model, prompt, greedy(60)) for i, prompt in zip(ids, PROMPTS, strict=True)}
    assert {i: output.generated_tokens for i, output in outputs.items()} == expected


def test_a_step_that_fails_leaves_no_states_in_modules() -> None:
    model = small_model("recurrent_gemma")
    block, fails = model.model.layers[0], [False]
    block.mlp_block.register_forward_hook(lambda *_: 1 // 0 if fails[0] else None)
    with model.continuous_batching_context_manager(greedy(4), async_batching=True) as manager:
        fails[0] = True
        output = manager.get_result(manager.add_request(PROMPTS[0]), timeout=60)
    assert "ZeroDivisionError" in output.error
    assert block.temporal_block.conv1d_state is None
    assert block.temporal_block.rg_lru.recurrent_states is None


class TestWhatCannotBeBatched:
    """Decoding of one sequence alone, keys that the model keeps itself."""

    @pytest.mark.parametrize("family", ["rwkv", "gpt_neo"])
    def test_runs_one_sequence_at_a_time(self, family: str) -> None:
        model = model_of(family)
        outputs, engine = answers(model, [{"input_ids": prompt} for prompt in PROMPTS])
        assert engine.settings.mode is Mode.SEQUENCES
        assert tokens(outputs) == [reference(model, prompt, greedy(12)) for prompt in PROMPTS]

    def test_is_found_out_by_its_logits(self, monkeypatch, log) -> None:
        resume = Kept.resume

        def mixed_up(kept: Kept, states: list[torch.Tensor]) -> object:
            return resume(kept, [s.roll(1, d.dim) for s, d in zip(states, kept.states, strict=True)])

        monkeypatch.setattr(Kept, "resume", mixed_up)
        monkeypatch.setattr(self_check, "_passed", set())
        model = small_model("mamba2", seed=1)
        with log.at_level(logging.WARNING):
            outputs, engine = answers(model, [{"input_ids": prompt} for prompt in PROMPTS])
        assert engine.settings.mode is Mode.SEQUENCES
        assert "one sequence at a time" in log.text
        assert tokens(outputs) == [generate_alone(model, prompt, greedy(12)) for prompt in PROMPTS]


if __name__ == "__main__":
    settings.choose_backend, self_check.check = lambda *_: "triton", lambda *_: None
    interpreted = model_of("qwen3_next")
    found, interpreting = answers(
        interpreted, [{"input_ids": PROMPTS[i][:9]} for i in (0, 1, 2, 3, 4, 2)], config=greedy(3), max_batch_tokens=14
    )
    assert tokens(found) == [reference(interpreted, PROMPTS[i][:9], greedy(3)) for i in (0, 1, 2, 3, 4, 2)]
    print(interpreting.settings.mode.name.lower())
