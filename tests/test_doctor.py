"""What the doctor says, and why the engine chose what it did."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import batching, greedy, new_model, shared_model
from test_timeline import regular

from transformers_async_cb import AsyncBatchingConfig, cli, doctor, shapes
from transformers_async_cb.bench import Observation
from transformers_async_cb.doctor import Capacity, Measurement
from transformers_async_cb.matrix.small import small_model
from transformers_async_cb.metrics import Metrics


def diagnose(capsys, *more: str) -> list[str]:
    cli.main(["doctor", "--device", "cpu", "--requests", "3", "--length", "24", *more])
    return capsys.readouterr().out.splitlines()


def test_a_screenful_says_what_is_there_what_was_chosen_and_what_it_gains(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = diagnose(capsys)
    text = "\n".join(lines)
    assert len(lines) < 45
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    for topic in (
        "versions",
        "device",
        "attention",
        "model",
        "cache",
        "requests at once",
        "graphs",
        "so it holds",
        "host",
    ):
        assert re.search(rf"^  {topic} ", text, re.MULTILINE), topic
    assert "triton: no, it needs a CUDA device" in text
    assert re.search(r"\d+ requests of 24 tokens", text)
    assert re.search(r"overlap +(pays|does not pay|changes little): \d", text)
    assert text.endswith("  * run it on a CUDA device: a CPU shows that it works, not how fast")


def test_a_model_that_the_engine_does_not_run_is_named_with_the_reason(monkeypatch) -> None:
    model = new_model("llama")
    model.lm_head.to("meta")
    monkeypatch.setattr(shapes, "load", lambda *_: model)
    with pytest.raises(SystemExit, match="does not run this model: LlamaForCausalLM has no weights in lm_head"):
        cli.main(["doctor", "--device", "cpu"])


@pytest.mark.parametrize(("family", "how"), [("mamba2", "a state for each row"), ("bloom", "one sequence at a time")])
def test_a_model_that_does_not_run_on_pages_is_measured_as_it_runs(family: str, how: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(shapes, "load", lambda *_: small_model(family))
    text = " ".join("\n".join(diagnose(capsys)).split())
    assert how in text
    assert "requests of 24 tokens" in text
    assert re.search(r"overlap (pays|does not pay|changes little): \d", text)


class TestAdvice:
    def measured(self, gap_on: float, gap_off: float, compiled: bool = True) -> Measurement:
        on, off = (
            Observation(regular(20, gap), Metrics(graphs=3), [], compiled, captured=True) for gap in (gap_on, gap_off)
        )
        return Measurement(8, 100, on, off, limit_ms=500.0)

    def test_is_nothing_where_all_is_well(self, monkeypatch) -> None:
        monkeypatch.setattr(doctor, "triton_error", lambda: None)
        model = torch.nn.Module()
        model.device, model.dtype = torch.device("cuda"), torch.bfloat16
        assert doctor.advice(model, Capacity(10_000, 64, []), 100, self.measured(0.01, 0.2)) == []

    def test_names_what_is_not(self, monkeypatch) -> None:
        monkeypatch.setattr(doctor, "triton_error", lambda: ImportError("none"))
        model = torch.nn.Module()
        model.device, model.dtype = torch.device("cuda"), torch.float32
        lines = doctor.advice(model, Capacity(500, 64, []), 100, self.measured(0.3, 0.1, compiled=False))
        for cause in ("install triton", "bfloat16", "do not compile", "fewer than 8", "overlap=False"):
            assert any(cause in line for line in lines), cause

    def test_says_what_overlap_is_worth(self) -> None:
        texts = {finding.topic: finding.text for finding in doctor.times(self.measured(0.0, 0.25))}
        assert (
            texts["overlap"] == "pays: 1000.00 ms from step to step with overlap, 1250.00 without, 25% more tokens/s"
        )
        assert texts["device"] == "1000.00 ms, 50% of the limit's speed"
        assert texts["captured"] == "yes, 3 sizes of steps"


class TestChoices:
    def of(self, config=None, own=None, requests: int = 0, **changes) -> dict[str, str]:
        manager = new_model("llama").init_continuous_batching(
            greedy(5), config, async_batching=own or AsyncBatchingConfig()
        )
        manager.add_requests([[1, 2, 3]] * requests)
        if requests:
            manager.size_for_pending()
        manager.warmup()
        manager.stop()
        return {name: f"{value}; {reason}" for name, value, reason in manager.choices}

    def test_say_what_is_the_default_and_why(self) -> None:
        choices = self.of()
        assert choices["pages"] == "of 16 tokens; the default"
        assert choices["requests at once"] == "up to 256; the default"
        assert choices["attention"] == "reference; triton needs a CUDA device"
        assert choices["graphs"] == "off; CUDA has them"
        assert choices["cache"].endswith("2 GiB on a CPU, or half of the free memory")

    def test_say_what_was_set(self) -> None:
        config = batching(num_blocks=64, page_size=8, max_batch_tokens=48, max_requests_per_batch=5)
        choices = self.of(config, AsyncBatchingConfig(overlap=False, attention_backend="reference"))
        assert choices["cache"].startswith("512 tokens, ")
        for name, setting in {
            "cache": "num_blocks", "pages": "page_size", "tokens a step": "max_batch_tokens",
            "requests at once": "max_requests_per_batch", "attention": "attention_backend", "overlap": "overlap=False",
        }.items():  # fmt: skip
            assert choices[name].endswith(f"{setting}, as set")

    def test_say_what_followed_from_the_requests(self) -> None:
        choices = self.of(requests=3)
        assert choices["requests at once"] == "up to 3; as many as there are"
        assert choices["cache"].endswith("what these requests can use")

    def test_are_a_line_each_in_the_log(self, log) -> None:
        log.set_level("INFO", "transformers.transformers_async_cb.keeper")
        shared_model("llama").generate_batch([[1]], generation_config=greedy(2), async_batching=True)
        assert "pages: of 16 tokens (the default)" in log.messages
        assert sum("the default" in message for message in log.messages) >= 5
