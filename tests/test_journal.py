"""A run with `resume=` goes on where it was killed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batching, greedy, new_model, random_prompts
from transformers import GenerationConfig, PreTrainedModel

from transformers_async_cb.journal import _NOT_THE_RUN
from transformers_async_cb.request import Request


PROMPTS = random_prompts(12, longest=30)
SAMPLED = GenerationConfig(do_sample=True, max_new_tokens=12)


@pytest.fixture
def llama() -> PreTrainedModel:
    return new_model("llama")


def answers(outputs: dict[str, Any]) -> dict[str, list[int]]:
    assert all(output.error is None for output in outputs.values())
    return {request_id: output.generated_tokens for request_id, output in outputs.items()}


def run(model: PreTrainedModel, folder: Path | None, config: GenerationConfig | None = None, **kwargs: Any) -> dict:
    prompts = kwargs.pop("prompts", PROMPTS)
    return model.generate_batch(prompts, config or greedy(12), async_batching=True, resume=folder, **kwargs)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def begun(model: PreTrainedModel, folder: Path, count: int, **kwargs: Any) -> None:
    """Leave a run after so many of its requests have finished."""
    results = run(model, folder, stream=True, **kwargs)
    for _ in range(count):
        next(results)
    results.close()


class TestARunThatIsResumed:
    @pytest.mark.parametrize("config", [greedy(12), SAMPLED], ids=["greedy", "sampled"])
    def test_gives_what_a_run_without_an_end_gives(self, llama, tmp_path, config: GenerationConfig) -> None:
        torch.manual_seed(5)
        whole = answers(run(llama, None, config))
        torch.manual_seed(5)
        begun(llama, tmp_path, 5, config=config)
        torch.manual_seed(6)
        assert answers(run(llama, tmp_path, config)) == whole

    def test_runs_only_what_is_missing(self, llama, tmp_path, monkeypatch) -> None:
        begun(llama, tmp_path, 5)
        done = {line["request_id"] for line in lines(tmp_path)[1:]}
        asked = []
        take = Request.start
        monkeypatch.setattr(Request, "start", lambda self: (asked.append(self.id), take(self)))
        run(llama, tmp_path)
        assert len(done) >= 5
        assert set(asked) == {f"req_{i}" for i in range(12)} - done

    def test_that_is_whole_runs_nothing(self, llama, tmp_path, monkeypatch) -> None:
        first = run(llama, tmp_path, record_timestamps=True)
        monkeypatch.setattr(Request, "start", lambda self: 1 / 0)
        assert run(llama, tmp_path, record_timestamps=True) == first

    def test_streams_what_is_there_first(self, llama, tmp_path) -> None:
        begun(llama, tmp_path, 3)
        there = [line["request_id"] for line in lines(tmp_path)[1:]]
        ids = [output.request_id for output in run(llama, tmp_path, stream=True)]
        assert ids[: len(there)] == there
        assert sorted(ids) == sorted(f"req_{i}" for i in range(12))

    @pytest.mark.parametrize("kept", [0, 1, 40])
    def test_forgives_a_last_line_that_is_torn(self, llama, tmp_path, kept: int) -> None:
        whole = answers(run(llama, tmp_path))
        file = tmp_path / "results.jsonl"
        content = file.read_bytes()
        last = content.rindex(b"\n", 0, -1) + 1
        file.write_bytes(content[: last + kept])
        assert answers(run(llama, tmp_path)) == whole
        assert len({line["request_id"] for line in lines(tmp_path)[1:]}) == len(lines(tmp_path)) - 1 == 12

    def test_keeps_log_probabilities(self, llama, tmp_path) -> None:
        asked = {"logprobs": 2, "prompt_logprobs": 1}
        whole = run(llama, tmp_path, **asked)
        for request_id, output in run(llama, tmp_path, **asked).items():
            assert output.top_logprobs == whole[request_id].top_logprobs
            assert output.prompt_logprobs == whole[request_id].prompt_logprobs
            assert len(output.top_logprobs) == 12

    def test_goes_on_within_the_sequences_of_a_prompt(self, llama, tmp_path) -> None:
        several = {"config": SAMPLED, "prompts": PROMPTS[:4], "num_return_sequences": 3}
        torch.manual_seed(5)
        whole = answers(run(llama, None, **several))
        torch.manual_seed(5)
        begun(llama, tmp_path, 4, **several)
        assert answers(run(llama, tmp_path, **several)) == whole
        assert len(whole) == 12

    def test_tries_failed_requests_again(self, llama, tmp_path) -> None:
        def impatient(ids: torch.Tensor, scores: None) -> bool:
            raise ValueError("not now")

        outputs = run(llama, tmp_path, stopping_criteria=[impatient])
        assert all("not now" in output.error for output in outputs.values())
        assert len(lines(tmp_path)) == 1


class TestAnotherRun:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"prompts": [[1], *PROMPTS[1:]]}, "other prompts:"),
            ({"prompts": PROMPTS[1:]}, "other prompts, or another number of them: give"),
            ({"config": greedy(13)}, "other max_new_tokens:"),
            ({"config": greedy(12, eos_token_id=[5])}, "other eos_ids:"),
            ({"config": GenerationConfig(do_sample=True, max_new_tokens=12)}, "other sampling:"),
            ({"repetition_penalty": 1.5}, "other shaping:"),
            ({"stopping_criteria": [print]}, "other stopping_criteria:"),
            ({"logprobs": 2}, "other ranked:"),
            ({"prompt_logprobs": 2}, "other prompt_scores:"),
            ({"continuous_batching_config": batching(return_logprobs=True)}, "other return_logprobs:"),
            ({"logits_processor": [lambda ids, scores: scores]}, "other shaping, processors:"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_in_the_folder_is_refused_and_left_alone(self, llama, tmp_path, change: dict, message: str) -> None:
        begun(llama, tmp_path, 2)
        before = (tmp_path / "results.jsonl").read_bytes()
        with pytest.raises(ValueError, match=message):
            run(llama, tmp_path, **change)
        assert (tmp_path / "results.jsonl").read_bytes() == before

    def test_with_other_weights_is_refused(self, llama, tmp_path) -> None:
        begun(llama, tmp_path, 2)
        with torch.no_grad():
            llama.lm_head.weight[3, 3] += 1
        with pytest.raises(ValueError, match="other model:"):
            run(llama, tmp_path)

    def test_at_the_same_time_is_refused(self, llama, tmp_path) -> None:
        results = run(llama, tmp_path, stream=True)
        with pytest.raises(RuntimeError, match="another process is running there"):
            run(new_model("llama"), tmp_path)
        results.close()

    @pytest.mark.parametrize("content", ["something\nelse\n", '{"a": 1}\n', "[]\n{}\n", '{"run": 1, "seed": 2}\n'])
    def test_that_is_none_is_refused(self, llama, tmp_path, content: str) -> None:
        (tmp_path / "results.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"results\.jsonl"):
            run(llama, tmp_path)

    @pytest.mark.parametrize("line", ["[1]", '{"a": 1}', '{"request_id": "x"}', '{"request_id": "req_0", "a": 1}'])
    def test_that_has_a_line_of_something_else_is_refused(self, llama, tmp_path, line: str) -> None:
        run(llama, tmp_path)
        with open(tmp_path / "results.jsonl", "a") as file:
            file.write(line + "\n")
        with pytest.raises(ValueError, match=r"results\.jsonl, line \d+, is not a result of this run"):
            run(llama, tmp_path)

    @pytest.mark.parametrize("folder", ["", 5, True])
    def test_in_what_is_no_folder_is_refused(self, llama, tmp_path, monkeypatch, folder: object) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=rf"resume={folder!r} must be the path of a folder"):
            run(llama, folder)
        assert not any(tmp_path.iterdir())


def test_every_field_of_a_request_is_either_of_the_run_or_not() -> None:
    of_the_run = {
        "id", "tokens", "max_new_tokens", "sampling", "eos_ids", "stop_strings", "max_time",
        "stopping_criteria", "shaping", "processors", "inputs", "constraint", "record_timestamps", "ranked",
        "prompt_scores",
    }  # fmt: skip
    assert set(Request.__dataclass_fields__) == of_the_run | _NOT_THE_RUN


# Runs that are killed, each in a process of its own; what each leaves is copied.
RUNS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from conftest import batching, new_model
from test_journal import MANY, SAMPLED
from transformers_async_cb.journal import Journal

folder, rng = Path(sys.argv[1]), random.Random(0)
file = folder / "run" / "results.jsonl"
for number in range(4):
    pid = os.fork()
    if pid == 0:
        add = Journal.add
        Journal.add = lambda self, output: (time.sleep(0.01), add(self, output))  # or it is over too soon
        torch.manual_seed(number)
        few = batching(max_requests_per_batch=4, max_batch_tokens=64)
        new_model("llama").generate_batch(MANY, SAMPLED, few, async_batching=True, resume=folder / "run")
        os._exit(0)
    if number < 3:
        more = (file.stat().st_size if file.exists() else 0) + rng.randrange(1, 4000)
        while not file.exists() or file.stat().st_size < more:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status == (signal.SIGKILL if number < 3 else 0), status
    shutil.copy(file, folder / f"after {number}")
"""
MANY = random_prompts(60, longest=30, seed=9)


def test_a_process_that_is_killed_again_and_again_loses_and_repeats_nothing(llama, tmp_path) -> None:
    arguments = [sys.executable, "-c", RUNS, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    left = [(tmp_path / f"after {number}").read_bytes().splitlines(keepends=True) for number in range(4)]
    for before, after in itertools.pairwise(left):
        whole = [line for line in before if line.endswith(b"\n")]
        assert after[: len(whole)] == whole
        assert len(whole) > 1
    assert len(left[0]) < len(left[-1]), "no run was killed before its end"
    results = [json.loads(line) for line in left[-1][1:]]
    assert sorted(result["request_id"] for result in results) == sorted(f"req_{i}" for i in range(60))
    torch.manual_seed(0)
    uninterrupted = answers(llama.generate_batch(MANY, SAMPLED, async_batching=True))
    assert {result["request_id"]: result["generated_tokens"] for result in results} == uninterrupted
