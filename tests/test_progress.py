"""The bar of a batch."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import greedy, random_prompts, reference, shared_model

from transformers_async_cb import progress


PROMPTS = random_prompts(3, 20)


def generate(limit: int = 30) -> None:
    model = shared_model("llama")
    outputs = model.generate_batch(
        PROMPTS, generation_config=greedy(limit), async_batching=True, progress_bar=True
    ).values()
    assert [output.generated_tokens for output in outputs] == [reference(model, p, greedy(limit)) for p in PROMPTS]


def test_says_how_many_are_done_and_what_the_engine_does(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "_REFRESH", 0.001)
    generate()
    err = capsys.readouterr().err
    assert "3/3" in err
    assert re.search(r"[1-9]\d* tokens/s, \d+% of the cache in use", err)


def test_is_quiet_where_nobody_looks(capsys) -> None:
    generate(3)
    assert capsys.readouterr().err == ""
