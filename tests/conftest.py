"""Tiny random models, prompts for them, and what `model.generate` answers, one prompt at a time."""

from __future__ import annotations

import functools
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import transformers_async_cb
from transformers_async_cb import self_check


torch.set_num_threads(1)  # models this small lose by more

if torch.cuda.is_available() and (workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT")):
    torch.cuda.set_per_process_memory_fraction(0.8 / int(workers))  # they share the GPU

VOCABULARY = 97
POSITIONS = 512
FAMILIES = ("llama", "qwen3", "mistral", "gpt2")

_ROTARY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
}
_LEARNED = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _ROTARY),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, _ROTARY),
    "mistral": (MistralConfig, MistralForCausalLM, _ROTARY | {"sliding_window": 16}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, _LEARNED),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, _ROTARY | {"sliding_window": 16}),
}


def new_model(family: str, device: str | torch.device = "cpu", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model that nobody else has. Its wide weights keep the logits of two tokens well apart.

    Args:
        family (`str`): one of `FAMILIES`, or "gpt_oss".
        changes: fields of the model's config.
    """
    config_class, model_class, settings = _KINDS[family]
    nothing_special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = config_class(**{**settings, "initializer_range": 0.3, **nothing_special, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    return model.to(device).eval()


def random_model(class_name: str, device: str = "cpu", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A float32 model of that class of transformers from a config of `settings`, with wide weights."""
    model_class, rng = getattr(transformers, class_name), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=rng)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.to(device)


@functools.cache
def shared_model(family: str, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model of that family that all tests share, for those that leave it as it is."""
    return new_model(family, device)


def random_prompts(count: int, longest: int = 300, shortest: int = 1, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `shortest` to `longest` random tokens."""
    rng = random.Random(seed)
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def greedy(max_new_tokens: int | None = None, eos_token_id: int | list[int] | None = None) -> GenerationConfig:
    """Greedy decoding up to a limit or an EOS. The pad id keeps `generate` from warning about having none."""
    return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, pad_token_id=0)


def batching(**settings: Any) -> ContinuousBatchingConfig:
    """A `ContinuousBatchingConfig`; `page_size` is called `block_size` in transformers 5.17."""
    if "page_size" in settings and not hasattr(ContinuousBatchingConfig(), "page_size"):
        settings["block_size"] = settings.pop("page_size")
    return ContinuousBatchingConfig(**settings)


def generate_alone(model: PreTrainedModel, prompt: Sequence[int], config: GenerationConfig) -> list[int]:
    """The new tokens of `model.generate` for one prompt."""
    ids = torch.tensor([list(prompt)], device=model.device)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return answer[0, len(prompt) :].tolist()


_answers: weakref.WeakKeyDictionary[PreTrainedModel, dict] = weakref.WeakKeyDictionary()


def reference(model: PreTrainedModel, prompt: Sequence[int], config: GenerationConfig) -> list[int]:
    """`generate_alone`, computed once; for models whose weights stay as they are."""
    key = (tuple(prompt), config.to_json_string())
    answers = _answers.setdefault(model, {})
    if key not in answers:
        answers[key] = generate_alone(model, prompt, config)
    return list(answers[key])


def generated_in_short_room(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    page_size: int = 16,
    request_settings: Sequence[dict[str, Any]] | None = None,
) -> list[list[int]]:
    """The new tokens of requests for which there are 8 pages in all, so that some were preempted."""
    manager = model.init_continuous_batching(
        config, continuous_batching_config=batching(num_blocks=8, page_size=page_size), async_batching=True
    )
    ids = manager.add_requests(prompts, request_settings=request_settings)
    manager.start()
    manager.stop(keep_for_next_session=True)
    assert manager._engine.scheduler.preemptions > 0
    found = {output.request_id: output.generated_tokens for output in manager}
    manager.destroy()
    return [found[i] for i in ids]


def run_in_interpreter(file: str) -> str:
    """What a test file prints, run as a script under Triton's interpreter: that is chosen when triton is imported."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(file).parent,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def in_child(work: Callable[[], bool], patience: float = 30) -> bool:
    """Whether `work` gives `True` in a child of `os.fork`, within seconds."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(not work())
        finally:  # it raised
            os._exit(1)
    end = time.monotonic() + patience
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return ended[1] == 0


def engine_threads() -> list[str]:
    """Names of the threads of all engines that run in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("async-batching")]


@pytest.fixture(params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """The shared model of each family in turn."""
    return shared_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    """The shared Llama, for tests of what does not depend on the model."""
    return shared_model("llama")


@pytest.fixture(autouse=True, scope="session")
def own_notes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which models have passed their check is noted beside the tests, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "FILE", tmp_path_factory.mktemp("notes") / "checked.json")
        yield


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package logs, which goes where transformers' own messages go, whatever a command has set before."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")
    caplog.set_level(logging.NOTSET, "transformers.transformers_async_cb")
    caplog.handler.setLevel(logging.NOTSET)
    return caplog


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test leaves the flag installed, no engine running and no model on loan."""
    yield
    assert transformers_async_cb.install(), "the test took the flag away"
    assert engine_threads() == [], "the test left threads running"
