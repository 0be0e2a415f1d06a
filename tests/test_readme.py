"""What the README shows works: its Python runs, its commands are ones that there are."""

from __future__ import annotations

import ast
import asyncio
import configparser
import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import torch
from conftest import greedy, new_model, random_prompts
from test_grammars import tokenizer
from test_model_inputs import asked
from test_model_inputs import new_model as seeing_model

import transformers_async_cb
from transformers_async_cb import cli


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list:
    """The code of one language, each block under the heading it stands under."""
    found, heading = [], ""
    for title, code in re.findall(rf"^#+ ([^\n]*)$|^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        heading = title or heading
        if code:
            found.append(pytest.param(code, id=heading))
    return found


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What the README says that its names stand for. A manager that runs has its model to itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prometheus_client, "REGISTRY", prometheus_client.CollectorRegistry())
    words = copy.deepcopy(tokenizer())
    words.pad_token = words.eos_token
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model, other = new_model("llama"), new_model("llama")
    prompts = random_prompts(3, longest=20, shortest=3)
    manager = other.init_continuous_batching(tokenizer=words, async_batching=True)
    manager.start()
    yield {
        "transformers_async_cb": transformers_async_cb, "model": model, "tokenizer": words, "manager": manager,
        "prompts": prompts[:2], "prompt": prompts[2], "cfg": greedy(8), "cfg_a": greedy(4), "cfg_b": greedy(5),
        "texts": ["ab", "cde"], "batch": words(["ab", "cde"], padding=True, return_tensors="pt"),
        "schema": {"type": "object", "properties": {"size": {"type": "integer"}}},
        "optimizer": torch.optim.SGD(other.parameters(), 1e-3),
    }  # fmt: skip
    manager.stop(hard_stop=True)
    model.destroy_cached_continuous_batching_manager()


def names_with_images() -> dict[str, Any]:
    """A model that sees, a processor for it, and what it is asked: texts and images."""

    def processor(text: str, images: int, return_tensors: str) -> dict[str, torch.Tensor]:
        prompt, inputs = asked("llava", len(text), images)
        return {"input_ids": torch.tensor([prompt]), **inputs}

    return {"model": seeing_model("llava"), "processor": processor, "asked": [("ab", 0), ("cde", 1)]}


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_as_it_stands(code: str, names: dict[str, Any]) -> None:
    if "processor" in code:
        names |= names_with_images()
    coroutine = eval(compile(code, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    if coroutine is not None:
        asyncio.run(coroutine)
    for output in (names.get("outputs") or {}).values():
        assert output.error is None
    if "request_id" in names and names["manager"].is_running():
        assert names["manager"].get_result(names["request_id"], 30).error is None


COMMANDS = [
    shlex.split(line)[1:]
    for block in blocks("bash")
    for line in block.values[0].splitlines()
    if line.startswith("transformers-async-cb ")
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_take_what_is_shown(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for command in cli.COMMANDS:
        monkeypatch.setattr(command, "run", ran.append)
    cli.main(arguments)
    assert len(ran) == 1


def test_extras_and_files_that_are_named_are_there() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = set(re.findall(r'"\.\[(\w+)\]"', README))
    assert extras
    assert extras <= set(config["options.extras_require"])
    files = re.findall(r"[(` ]((?:examples|tests)/[\w.]+\.\w+)", README)
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []
