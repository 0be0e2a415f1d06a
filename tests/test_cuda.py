"""The same promises on the GPU: tokens as `generate`'s, graphs replayed, streams ordered. Run with `pytest -m gpu`."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, batching, greedy, new_model, random_prompts, reference, shared_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from transformers_async_cb import AsyncBatchingConfig, bench, compiling, gpu
from transformers_async_cb.engine import Engine
from transformers_async_cb.lanes import CudaLane, Lanes
from transformers_async_cb.recorder import Recorder


pytestmark = pytest.mark.gpu


def tight(**changes) -> ContinuousBatchingConfig:
    """Pages for two or three of the requests, and prompts cut into chunks."""
    return batching(page_size=4, num_blocks=100, max_batch_tokens=48, **changes)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no-graphs"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_on_the_gpu_are_those_of_generate(family, overlap, graphs):
    model = shared_model(family, "cuda")
    draw, eos_ids = random.Random(0), [3, 17, 31, 50, 77, 90]
    asked = [(prompt, draw.randint(1, 24)) for prompt in random_prompts(200)]
    expected = [reference(model, prompt, greedy(limit, eos_ids)) for prompt, limit in asked]
    manager = model.init_continuous_batching(
        greedy(eos_token_id=eos_ids),
        tight(use_cuda_graph=graphs),
        async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
    )
    ids = [manager.add_request(prompt, max_new_tokens=limit) for prompt, limit in asked]
    manager.start()
    engine = manager._engine
    answers = {output.request_id: output for output in (manager.get_result() for _ in ids)}
    manager.stop()
    assert [answers[i].error for i in ids] == [None] * len(ids)
    assert [answers[i].generated_tokens for i in ids] == expected
    assert (engine.scheduler.preemptions > 0) is (family != "mistral"), "but where a window bounds what each holds"
    assert engine.runner.compiled, "the layers compiled"
    assert engine.runner.graphs.on is graphs
    assert bool(engine.runner.graphs.captured) is graphs, "and steps were captured"
    engine.scheduler.check_books()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_runs_to_the_end(family):
    model = new_model(family, "cuda").to(torch.bfloat16)
    prompts = random_prompts(64)
    outputs = model.generate_batch(prompts, generation_config=greedy(40), async_batching=True)
    assert [len(output.generated_tokens) for output in outputs.values()] == [40] * 64
    assert all(0 <= token < VOCABULARY for output in outputs.values() for token in output.generated_tokens)


def test_samples_are_the_same_with_graphs_and_without():
    model = shared_model("llama", "cuda")
    prompts = random_prompts(32, longest=60)
    config = GenerationConfig(do_sample=True, temperature=0.9, top_k=20, top_p=0.9, max_new_tokens=24, eos_token_id=-1)
    runs = [
        model.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(seed=7, use_cuda_graph=graphs, return_logprobs=True),
            async_batching=AsyncBatchingConfig(overlap=overlap),
        )
        for graphs, overlap in [(True, True), (False, True), (True, False)]
    ]
    tokens = [[output.generated_tokens for output in outputs.values()] for outputs in runs]
    assert tokens[0] == tokens[1] == tokens[2]
    logprobs = [torch.tensor([output.logprobs for output in outputs.values()]) for outputs in runs]
    assert torch.allclose(logprobs[0], logprobs[1], atol=1e-4)


def test_kernels_that_start_early_give_the_tokens_of_those_that_do_not(monkeypatch):
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "dtype": torch.bfloat16}
    prompts = random_prompts(32, longest=60)

    def generated() -> list[list[int]]:
        model = new_model("llama", "cuda", **wide).bfloat16()  # wide enough for products of few rows
        outputs = model.generate_batch(prompts, generation_config=greedy(64), async_batching=True)
        assert [output.error for output in outputs.values()] == [None] * 32
        return [output.generated_tokens for output in outputs.values()]

    from transformers_async_cb.linear import triton as linear_triton

    early = generated()
    torch._dynamo.reset()
    for module in (compiling, gpu, linear_triton):
        monkeypatch.setattr(module, "starts_early", lambda device: False)
    assert generated() == early


def test_a_kept_manager_follows_weights_that_change_in_place_and_weights_that_move():
    model = new_model("llama", "cuda")
    prompts, config = random_prompts(20, longest=40), greedy(16)

    def generated() -> list[list[int]]:
        outputs = model.generate_batch(prompts, generation_config=config, persistent_manager=True, async_batching=True)
        return [output.generated_tokens for output in outputs.values()]

    def expected() -> list[list[int]]:
        return [reference(new_copy(model), prompt, config) for prompt in prompts]

    try:
        assert generated() == expected()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        assert generated() == expected()
        for parameter in model.parameters():  # new storage: what was captured reads the old one
            parameter.data = parameter.data.flip(0).clone()
        assert generated() == expected()
    finally:
        model.destroy_cached_continuous_batching_manager()


def new_copy(model):
    copy = new_model("llama", "cuda")
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("most_steps", [2**14, 8])
def test_a_recording_has_the_steps_of_the_device_on_the_hosts_clock(most_steps):
    manager = shared_model("llama", "cuda").init_continuous_batching(greedy(24), tight(), async_batching=True)
    manager.add_requests(random_prompts(20, longest=60))
    manager.warmup()
    engine = manager._engine
    engine.recorder = recorder = Recorder(most_steps)
    before = engine.steps  # of the warm-up
    manager.start()
    manager.stop()
    steps, kept = recorder.device_spans(), min(engine.steps - before, most_steps)
    for spans in (steps, recorder.device_spans("copy_in"), recorder.device_spans("copy_out")):
        assert [span.step for span in spans] == list(range(engine.steps - kept, engine.steps))
        assert all(span.begin < span.end for span in spans)
        assert all(one.end <= following.begin for one, following in pairwise(spans))
    launches = {span.step: span.begin for span in recorder.host_spans() if span.phase == "launch"}
    waits = {span.step: span.end for span in recorder.host_spans() if span.phase == "wait"}
    slack = 2e-3  # between the two clocks
    assert all(launches[span.step] - slack < span.begin < span.end < waits[span.step] + slack for span in steps)
    times = recorder.step_times()
    assert times.steps == kept
    assert 0 < times.active <= 1


def test_the_limit_of_a_workload_is_below_what_it_takes():
    model = new_model("llama", "cuda").bfloat16()
    workload = bench.Workload(16, (8, 40), (24, 24))
    rates = bench.measure_rates(model.device, model.dtype)
    assert rates.bytes > 1e10
    assert rates.flops > 1e12
    result = bench.measure(model, "ours", workload, repeats=2)
    assert 0 < bench.limit_seconds(model, workload, rates) < min(result.seconds)
    assert 0 < result.gpu_active <= 1
    assert 0 < result.step_ms * result.steps / 1e3 < max(result.seconds) * 2
    assert result.peak_gib > 0


def test_steps_and_their_graphs_find_room_in_what_the_allocator_has_cached():
    model = shared_model("llama", "cuda")
    torch.cuda.empty_cache()
    cached = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    fraction = torch.cuda.get_per_process_memory_fraction()
    total = torch.cuda.get_device_properties(model.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    try:
        del cached
        with model.continuous_batching_context_manager(
            greedy(24), continuous_batching_config=tight(), async_batching=True, warmup=False
        ) as manager:
            manager.add_requests(random_prompts(40))
            engine = manager._engine
        assert [output.error for output in manager] == [None] * 40
        assert engine.runner.graphs.on
        assert engine.runner.graphs.captured
    finally:
        torch.cuda.set_per_process_memory_fraction(fraction)


def test_engines_one_after_another_compute_on_the_same_streams():
    model = shared_model("llama", "cuda")
    streams = set()
    for _ in range(3):
        with model.continuous_batching_context_manager(
            greedy(4), continuous_batching_config=tight(), async_batching=True, warmup=False
        ) as manager:
            manager.add_requests(random_prompts(4))
            lanes = manager._engine.lanes
            streams.add((lanes.copy_in.stream, lanes.compute.stream, lanes.copy_out.stream))
    assert len(streams) == 1


@pytest.fixture
def sanitized(monkeypatch):
    """torch's stream sanitizer on the engine's thread."""
    from torch.cuda import _gpu_trace
    from torch.cuda._sanitizer import CUDASanitizerDispatchMode

    registries = [each for name, each in vars(_gpu_trace).items() if name.endswith("Callbacks")]
    for registry in registries:  # so that the sanitizer is told no more when the test has ended
        monkeypatch.setattr(registry, "callback_list", list(registry.callback_list))
    mode, run = CUDASanitizerDispatchMode(), Engine.run

    def watched(self, *args):
        with mode:
            run(self, *args)

    monkeypatch.setattr(Engine, "run", watched)


def sanitized_errors() -> list[str | None]:
    model = new_model("llama", "cuda")
    outputs = model.generate_batch(
        random_prompts(40, longest=120),
        generation_config=greedy(24, eos_token_id=[3, 11]),
        continuous_batching_config=tight(use_cuda_graph=False),
        async_batching=AsyncBatchingConfig(compile_layers=False),
    )
    return [output.error for output in outputs.values()]


def test_the_stream_sanitizer_finds_no_hazard(sanitized):
    assert sanitized_errors() == [None] * 40


@pytest.mark.parametrize("lane", ["compute", "copy_out"])
def test_the_stream_sanitizer_finds_the_hazard_when_a_lane_does_not_wait(sanitized, monkeypatch, lane):
    launch, wait = Lanes.launch, CudaLane.wait
    careless = set()

    def marking(self, *args, **kwargs):
        careless.add(getattr(self, lane))
        launch(self, *args, **kwargs)

    monkeypatch.setattr(Lanes, "launch", marking)
    monkeypatch.setattr(CudaLane, "wait", lambda self, event: None if self in careless else wait(self, event))
    errors = sanitized_errors()
    assert all(error is not None and "CUDASanitizerErrors" in error for error in errors)
