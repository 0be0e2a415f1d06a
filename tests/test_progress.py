"""The bars of a batch and of a warm-up."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable

import pytest
from conftest import batching, greedy, random_prompts, reference, shared_model

from transformers_async_cb import progress


ROWS = 4
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


@pytest.fixture
def warm_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Warms a manager up, with something to compile in each step."""

    def warm_up() -> None:
        manager = shared_model("llama").init_continuous_batching(
            greedy(8), batching(max_requests_per_batch=ROWS, max_batch_tokens=64), async_batching=True
        )
        manager._keeper.prepare(manager.workload)
        engine = manager._engine
        engine.warm = False  # as where something is compiled or captured
        stage = engine.runner.stage

        def slow_stage(*arguments: object) -> None:
            engine.runner.warming_up = f"compiling step {engine.steps}"
            time.sleep(0.03)
            stage(*arguments)

        monkeypatch.setattr(engine.runner, "stage", slow_stage)
        manager.warmup()
        assert engine.warm_up_progress() == (0, 0)
        manager.stop()

    monkeypatch.setattr(progress, "_REFRESH", 0.001)
    return warm_up


TOKENS = 2 * ROWS * 4  # that a warm-up generates


def test_of_a_warm_up_says_how_far_it_is_and_what_it_does(capsys, monkeypatch: pytest.MonkeyPatch, warm_up) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    warm_up()
    err = capsys.readouterr().err
    assert f"0/{TOKENS} [" in err
    shown = [int(count) for count in re.findall(rf"(\d+)/{TOKENS} \[[^\r]*compiling step \d", err)]
    assert shown == sorted(shown)
    assert TOKENS / 2 <= shown[-1] < TOKENS


def test_of_a_warm_up_is_quiet_where_nobody_looks_but_in_the_log(capsys, log, warm_up) -> None:
    log.set_level("INFO", progress.logger.name)
    warm_up()
    assert "Warming up" not in capsys.readouterr().err
    said = [re.fullmatch(rf"warming up, (\d+) of {TOKENS} tokens: compiling step \d", text) for text in log.messages]
    counts = [int(match[1]) for match in said if match]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] >= TOKENS / 2
