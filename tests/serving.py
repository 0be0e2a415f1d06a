"""A server on a socket, with a tiny model and a tokenizer of single bytes, for the tests that ask it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import batching, generate_alone, greedy, new_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from transformers_async_cb.manager import AsyncBatchingManager


openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from transformers_async_cb.serve.app import Server, create_app  # noqa: E402


PATIENCE = 30
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ suffix or '' }}"
)


def save_model(path: Path, template: str = TEMPLATE, **tokenizer_settings: Any) -> Path:
    """A tiny model and a tokenizer of single bytes, as users find them in a folder: `é` is two tokens."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(bytes_)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", chat_template=template, **tokenizer_settings
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    tokenizer.save_pretrained(path)
    new_model("llama", vocab_size=len(tokenizer), initializer_range=0.2).save_pretrained(path)
    return path


def ask(url: str, body: str | dict | None = None) -> tuple[int, dict]:
    """Status and answer; a body makes it a POST."""
    data = body if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Running:
    """A server on a thread of its own, and what a test asks about it."""

    def __init__(self, manager: AsyncBatchingManager, tokenizer: PreTrainedTokenizerFast) -> None:
        self.manager, self.tokenizer, self.model = manager, tokenizer, manager.model
        self.twin: AutoModelForCausalLM  # same weights, not on loan
        config = uvicorn.Config(create_app(Server(manager, tokenizer, "tiny")), port=0, log_level="critical")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run)

    @property
    def url(self) -> str:
        host, port = self.uvicorn.servers[0].sockets[0].getsockname()
        return f"http://{host}:{port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def post(self, route: str, body: str | dict) -> tuple[int, dict]:
        """Status and answer."""
        return ask(f"{self.url}/v1/{route}", body)

    def expected(self, prompt: str, new_tokens: int) -> str:
        """What `generate` answers to a text."""
        tokens = generate_alone(self.twin, self.tokenizer(prompt).input_ids, greedy(new_tokens))
        return self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")

    def wait_until_nothing_is_held(self) -> None:
        """Raises `AssertionError` if a request still runs, or holds pages, after a while."""
        scheduler, end = self.manager._engine.scheduler, time.monotonic() + PATIENCE
        while self.manager._door.live or not scheduler.idle or scheduler.pages.free < scheduler.pages.count:
            assert time.monotonic() < end, "a request that nobody waits for still runs"
            time.sleep(0.01)
        scheduler.check_books()


@contextmanager
def serving(folder: Path, eos_token_id: int | None = None, max_queue_size: int = 0, **init: Any) -> Iterator[Running]:
    """Serve the model of a folder. `init` is for `init_continuous_batching`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = eos_token_id
    manager = model.init_continuous_batching(
        continuous_batching_config=batching(page_size=16, num_blocks=1024, max_queue_size=max_queue_size),
        tokenizer=tokenizer, async_batching=True, **init,
    )  # fmt: skip
    running = Running(manager, tokenizer)
    running.twin = AutoModelForCausalLM.from_pretrained(folder)
    running.thread.start()
    end = time.monotonic() + PATIENCE
    while not running.uvicorn.started:
        assert running.thread.is_alive() and time.monotonic() < end
        time.sleep(0.005)
    try:
        yield running
    finally:
        running.uvicorn.should_exit = True
        running.thread.join(PATIENCE)
