"""A run as a trace, a picture and numbers."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import greedy, new_model, random_prompts, reference, shared_model

from transformers_async_cb import AsyncBatchingConfig, cli
from transformers_async_cb.recorder import HOST_PHASES, Recorder, Span, StepSize
from transformers_async_cb.timeline import Timeline, picture, write


PROMPTS = random_prompts(4, 20)
THREADS = ["CPU", "device copy-in", "device compute", "device copy-out"]


def regular(steps: int, gap: float = 0.25) -> Timeline:
    """Steps of 1 s each and `gap` seconds between them, prepared while the last one computes."""
    begins = [step * (1 + gap) for step in range(steps)]
    host = [
        span
        for step, at in enumerate(begins)
        for span in (Span("plan", step, at - 0.5, at - 0.4), Span("launch", step, at - 0.4, at - 0.3))
    ]
    lanes = {
        "copy_in": [Span("copy_in", step, at - 0.3, at - 0.2) for step, at in enumerate(begins)],
        "compute": [Span("compute", step, at, at + 1) for step, at in enumerate(begins)],
        "copy_out": [Span("copy_out", step, at + 1, at + 1.1) for step, at in enumerate(begins)],
    }
    return Timeline("made up", "GPU", host, lanes, {step: StepSize(step, 3, 3, 3) for step in range(steps)})


class TestATimeline:
    def test_says_how_much_of_the_time_the_device_was_active(self) -> None:
        summary = regular(5).summary()
        assert summary.seconds == pytest.approx(6)
        assert summary.active == pytest.approx(5 / 6)
        assert summary.gap_ms == pytest.approx(250)
        assert (summary.step_ms, summary.period_ms) == pytest.approx((1000, 1250))
        assert summary.host_ms == pytest.approx(200)
        assert [summary.phases_ms[phase] for phase in ("plan", "launch", "wait")] == pytest.approx([100, 100, 0])
        assert summary.copies_ms == pytest.approx({"copy_in": 100, "copy_out": 100})

    def test_of_nothing_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no step was recorded"):
            Timeline.of(Recorder(), "nothing", "cpu")

    def test_shows_typical_steps_of_decoding(self) -> None:
        timeline = regular(40)
        slow = Span("compute", 20, timeline.lanes["compute"][20].begin, timeline.lanes["compute"][20].begin + 1.2)
        timeline.lanes["compute"][20] = slow
        for step in range(15):  # prompts, at first
            timeline.sizes[step] = StepSize(step, 3, 0, 50)
        window = picture.Window.of(timeline)
        assert window.begin >= timeline.lanes["compute"][15].begin
        assert window.end - window.begin == pytest.approx(picture.SHOWN * 1.25)


def events(file: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == kind]


class TestATrace:
    def test_names_the_lanes_and_has_each_step_on_each_of_them(self, tmp_path) -> None:
        file = tmp_path / "run.json"
        model = new_model("llama")
        config = AsyncBatchingConfig(timeline=str(file))
        outputs = model.generate_batch(PROMPTS, generation_config=greedy(6), async_batching=config)
        assert [o.generated_tokens for o in outputs.values()] == [reference(model, p, greedy(6)) for p in PROMPTS]
        names = [event["args"]["name"] for event in events(file, "M") if event["name"] == "thread_name"]
        assert names == THREADS
        pieces = events(file, "X")
        for tid in range(1, len(THREADS)):
            steps = [event for event in pieces if event["tid"] == tid]
            assert [event["args"]["step"] for event in steps] == list(range(6))
            assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in pairwise(steps))
        phases = {event["name"] for event in pieces if event["tid"] == 0}
        assert phases >= set(HOST_PHASES)
        assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in pieces)
        first = next(event for event in pieces if event["name"] == "step 0")
        assert (first["args"]["sequences"], first["args"]["tokens"]) == (4, sum(map(len, PROMPTS)))

    def test_has_an_arrow_from_each_launch_to_its_step(self, tmp_path) -> None:
        file = tmp_path / "run.json"
        write(str(file), [regular(3), regular(2)])
        starts, ends = events(file, "s"), events(file, "f")
        assert [(e["pid"], e["id"]) for e in starts] == [(e["pid"], e["id"]) for e in ends]
        assert [(e["pid"], e["id"]) for e in starts] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
        assert all(a["ts"] <= b["ts"] for a, b in zip(starts, ends, strict=True))


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_shows_steps_lanes_and_numbers(tmp_path, ending: str) -> None:
    file = tmp_path / f"run.{ending}"
    write(str(file), [regular(12), regular(4)])
    if ending == "svg":
        text = file.read_text()
        for words in ("made up", "GPU copy-in", "GPU active 81.4%", "step 3", "GPU idle"):
            assert words in text
    else:
        assert file.read_bytes().startswith(b"\x89PNG")


class TestAManager:
    def test_traces_a_part_of_a_run(self, tmp_path) -> None:
        file = tmp_path / "part.json"
        model = shared_model("llama")
        with model.continuous_batching_context_manager(greedy(5), async_batching=True) as manager:
            manager.get_result(manager.add_request(PROMPTS[0]))
            with manager.trace(str(file)):
                manager.get_result(manager.add_request(PROMPTS[1]))
            steps = [event["args"]["step"] for event in events(file, "X") if event["tid"] == 2]
            assert steps == list(range(steps[0], steps[0] + 5))
            assert steps[0] >= 5
            assert manager._engine.recorder is None
            output = manager.get_result(manager.add_request(PROMPTS[2]))
        assert output.generated_tokens == reference(model, PROMPTS[2], greedy(5))

    def test_traces_a_run_that_starts_and_stops_within(self, tmp_path) -> None:
        file = tmp_path / "whole.svg"
        manager = shared_model("llama").init_continuous_batching(greedy(5), async_batching=True)
        with manager.trace(str(file)):
            manager.add_requests(PROMPTS)
            manager.start()
            manager.stop()
        assert "LlamaForCausalLM, overlap on" in file.read_text()

    def test_records_one_timeline_at_a_time(self, tmp_path) -> None:
        manager = shared_model("llama").init_continuous_batching(greedy(2), async_batching=True)
        second = manager.trace(str(tmp_path / "second.json"))
        with manager.recording(), pytest.raises(RuntimeError, match="recorded already"):
            second.__enter__()
        manager.stop()

    def test_says_what_a_file_may_be_called_before_anything_runs(self, monkeypatch) -> None:
        manager = shared_model("llama").init_continuous_batching(greedy(2), async_batching=True)
        with pytest.raises(ValueError, match=r"'run.txt' must end with one of .json, .png"):
            AsyncBatchingConfig(timeline="run.txt")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"needs matplotlib: pip install 'transformers-async-cb\[plot\]'"):
            manager.trace("run.png").__enter__()
        manager.stop()

    def test_gives_its_results_though_the_file_cannot_be_written(self, tmp_path) -> None:
        config = AsyncBatchingConfig(timeline=str(tmp_path / "no such folder" / "run.json"))
        model = shared_model("llama")
        outputs = model.generate_batch(PROMPTS[:1], generation_config=greedy(3), async_batching=config)
        assert outputs["req_0"].generated_tokens == reference(model, PROMPTS[0], greedy(3))


def test_the_command_shows_overlap_on_and_off(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    files = [tmp_path / "t.json", tmp_path / "t.png"]
    cli.main([
        "timeline", *map(str, files), "--device", "cpu", "--requests", "3", "--prompt-tokens", "4-6",
        "--new-tokens", "8",
    ])  # fmt: skip
    out = capsys.readouterr().out
    processes = [event["args"]["name"] for event in events(files[0], "M") if event["name"] == "process_name"]
    assert processes == ["overlap on", "overlap off"]
    assert files[1].stat().st_size > 0
    for words in (*processes, "device active", "copy-out, ms", "t.png"):
        assert words in out
