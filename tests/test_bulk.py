"""`run`: a file of prompts in, a file of answers out."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import generate_alone, greedy
from transformers import GenerationConfig

from transformers_async_cb import bulk, cli, shapes
from transformers_async_cb.bulk import Answers, Row, Source
from transformers_async_cb.json_lines import JsonLines
from transformers_async_cb.manager import AsyncBatchingManager


TEXTS = ["Hello", "def f(x):", "In the beginning", "a", "The quick brown fox"]


@pytest.fixture
def rows(tmp_path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(TEXTS)))
    return file


def run(source: Path, target: Path, *more: str) -> list[dict[str, Any]]:
    cli.main(["run", str(source), str(target), "--device", "cpu", "--max-new-tokens", "6", *more])
    return answers(target)


def answers(file: Path) -> list[dict[str, Any]]:
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda answer: answer["index"])


def test_writes_what_generate_answers_beside_each_row(rows, tmp_path) -> None:
    model, tokenizer = shapes.load("tiny", "cpu", torch.float32), shapes.load_tokenizer("tiny")
    for text, answer in zip(TEXTS, run(rows, tmp_path / "out.jsonl"), strict=True):
        expected = generate_alone(model, tokenizer(text).input_ids, greedy(6))
        assert answer["output"] == tokenizer.decode(expected)
        assert (answer["prompt_tokens"], answer["new_tokens"]) == (len(text), 6)
        assert answer["row"] == {"id": answer["index"], "prompt": text}


def test_says_which_rows_failed_and_answers_the_others(tmp_path, capsys) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": "\n\n{"text": "x"}\n{"messages": []}\n[1]\n'
    )
    with pytest.raises(SystemExit) as end:
        run(source, target)
    assert end.value.code == 1
    good, *bad = answers(target)
    assert good["new_tokens"] == 6
    assert [answer["index"] for answer in bad] == [1, 2, 3, 4]
    causes = ("is not JSON", "no column 'messages', but ['text']", "row 3: the prompt is empty", "holds a list")
    assert all(cause in answer["error"] for cause, answer in zip(causes, bad, strict=True))
    assert "5 rows are done, 4 of them failed" in capsys.readouterr().err


@pytest.mark.parametrize("column, prompt", [("question", "Hello"), ("ids", [1, 2, 3])])
def test_takes_a_column_by_name(tmp_path, column: str, prompt: str | list[int]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "", column: prompt}) + "\n")
    (answer,) = run(source, tmp_path / "out.jsonl", "--column", column)
    assert answer["prompt_tokens"] == len(prompt)


def test_takes_a_folder_of_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"prompt": TEXTS})
    datasets.DatasetDict({"train": dataset.select([0]), "test": dataset}).save_to_disk(str(tmp_path / "data"))
    found = run(tmp_path / "data", tmp_path / "out.jsonl", "--split", "test")
    assert [answer["row"]["prompt"] for answer in found] == TEXTS
    with pytest.raises(SystemExit, match="no split 'dev', but train, test"):
        run(tmp_path / "data", tmp_path / "other.jsonl", "--split", "dev")


class TestARunThatWasKilled:
    SAMPLING = ("--temperature", "0.9", "--set", "repetition_penalty=1.1")

    def test_goes_on_where_it_ended_and_samples_the_same(self, rows, tmp_path, monkeypatch, capsys) -> None:
        target = tmp_path / "out.jsonl"
        whole = run(rows, target, *self.SAMPLING)
        lines = target.read_bytes().splitlines(keepends=True)
        target.write_bytes(b"".join(lines[:2]) + lines[2][:20])
        added: list[str] = []
        add = AsyncBatchingManager.add_request
        monkeypatch.setattr(
            AsyncBatchingManager,
            "add_request",
            lambda *args, **kwargs: added.append(add(*args, **kwargs)) or added[-1],
        )
        assert run(rows, target, *self.SAMPLING) == whole
        assert sorted(added) == sorted(f"row {json.loads(line)['index']}" for line in lines[2:])
        assert "2 of 5 rows are done already" in capsys.readouterr().err
        assert run(rows, target, *self.SAMPLING) == whole
        assert len(added) == 3

    def test_does_not_go_on_with_other_settings(self, rows, tmp_path) -> None:
        target = tmp_path / "out.jsonl"
        run(rows, target)
        with pytest.raises(SystemExit, match=r"begun with other settings, .*'max_new_tokens': 6.*'top_k': 3"):
            run(rows, target, "--top-k", "3")

    def test_does_not_write_to_what_is_no_run(self, rows, tmp_path) -> None:
        target = tmp_path / "precious.jsonl"
        target.write_text("precious\n")
        with pytest.raises(SystemExit, match="is there already, and nothing says how it was made"):
            run(rows, target)
        assert target.read_text() == "precious\n"

    def test_of_a_failing_engine_has_its_rows_still_to_do(self, rows, tmp_path, monkeypatch) -> None:
        target = tmp_path / "out.jsonl"
        with monkeypatch.context() as broken:
            broken.setattr("transformers_async_cb.engine.Engine._launch", lambda *_: 1 / 0)
            with pytest.raises(SystemExit, match=r"the engine failed.*division by zero"):
                run(rows, target)
        assert target.read_text() == ""
        assert len(run(rows, target)) == len(TEXTS)


def test_rows_are_read_as_there_is_room_for_them(tmp_path) -> None:
    model, tokenizer = shapes.load("tiny", "cpu", torch.float32), shapes.load_tokenizer("tiny")
    file = Answers(str(tmp_path / "out.jsonl"), {"column": "text"})
    ahead: list[int] = []

    def rows():
        for i in range(30):
            ahead.append(i - file.count)
            yield Row(i, {"text": "Hi"})

    with model.continuous_batching_context_manager(greedy(3), tokenizer=tokenizer, async_batching=True) as manager:
        bulk.answer_all(manager, tokenizer, rows(), "text", file, window=4)
    file.close()
    assert file.count == 30
    assert max(ahead) == 3


def test_an_output_that_another_run_writes_to_is_refused(rows, tmp_path) -> None:
    target = tmp_path / "out.jsonl"
    file = Answers(str(target), {"column": "text"})
    with pytest.raises(SystemExit, match="another process is running there"):
        run(rows, target)
    file.close()


def test_a_source_says_which_column_it_needs(tmp_path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match=r"none of the columns prompt, messages, text, but \['question'\]"):
        Source(str(file)).column()
    with pytest.raises(ValueError, match="there is no such file or folder"):
        Source(str(tmp_path / "nothing"))


def test_a_setting_that_transformers_does_not_have_is_refused(rows, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        run(rows, tmp_path / "out.jsonl", "--set", "temprature=1")
    assert "'temprature=1' is not NAME=VALUE with a name of GenerationConfig" in capsys.readouterr().err


def test_models_of_a_shape_have_each_a_config_of_their_own() -> None:
    one, other = (shapes.load("tiny", "cpu", torch.float32) for _ in range(2))
    one.config._attn_implementation = "eager"
    assert other.config._attn_implementation == shapes.load("tiny", "cpu", torch.float32).config._attn_implementation
    assert other.config._attn_implementation != "eager"


def test_the_tokenizer_of_a_shape_takes_any_text_and_knows_each_token() -> None:
    tokenizer = shapes.load_tokenizer("tiny")
    text = "Zürich, 東京 🙂\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == shapes.SHAPES["tiny"].vocab_size
    assert len({tokenizer.decode([i]) for i in range(256, len(tokenizer))}) == len(tokenizer) - 256


def test_a_row_gets_one_answer_where_the_generation_config_says_more(tmp_path) -> None:
    model, tokenizer = shapes.load("tiny", "cpu", torch.float32), shapes.load_tokenizer("tiny")
    file = Answers(str(tmp_path / "out.jsonl"), {"column": "text"})
    several = GenerationConfig(max_new_tokens=3, do_sample=True, num_return_sequences=3)
    with model.continuous_batching_context_manager(several, tokenizer=tokenizer, async_batching=True) as manager:
        bulk.answer_all(manager, tokenizer, [Row(i, {"text": "Hi"}) for i in range(6)], "text", file, window=2)
    file.close()
    assert [answer["index"] for answer in answers(tmp_path / "out.jsonl")] == list(range(6))


def test_a_line_that_is_nested_too_deeply_is_one_failed_row(tmp_path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"prompt": "a"}\n')
    with pytest.raises(SystemExit) as end:
        run(source, target)
    assert end.value.code == 1
    failed, answered = answers(target)
    assert "this line is not JSON: maximum recursion depth" in failed["error"]
    assert answered["new_tokens"] == 6


def test_an_input_whose_rows_have_changed_is_not_gone_on_with(rows, tmp_path) -> None:
    target = tmp_path / "out.jsonl"
    run(rows, target)
    before = rows.read_text()
    rows.write_text(before + '{"prompt": "one more"}\n')
    assert len(run(rows, target)) == len(TEXTS) + 1
    rows.write_text('{"prompt": "a new first"}\n' + before)
    with pytest.raises(SystemExit, match=r"row 0 of the input is not the one that .*out.jsonl answers"):
        run(rows, target)


@pytest.mark.parametrize("noted", ["", "[1]", "{"])
def test_notes_of_a_run_that_cannot_be_read_are_told(rows, tmp_path, noted: str) -> None:
    target = tmp_path / "out.jsonl"
    run(rows, target)
    (tmp_path / "out.jsonl.run").write_text(noted)
    with pytest.raises(SystemExit, match=r"out.jsonl.run does not say how .* was made"):
        run(rows, target)


@pytest.mark.parametrize(
    "line", ['{"index": 0}', '{"index": "x", "row": {}}', '{"index": -9, "row": {}}', '{"index": 0, "row": 5}']
)
def test_an_output_with_a_line_of_something_else_is_told(rows, tmp_path, line: str) -> None:
    target = tmp_path / "out.jsonl"
    run(rows, target)
    with open(target, "a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit, match=r"out.jsonl, line 6, is not an answer of a run"):
        run(rows, target)


def test_an_input_without_rows_and_an_output_that_is_a_folder_are_told(rows, tmp_path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(SystemExit, match=r"empty\.jsonl has no row"):
        run(empty, tmp_path / "out.jsonl")
    with pytest.raises(SystemExit, match="Is a directory"):
        run(rows, tmp_path)


def test_a_full_disk_ends_a_run_in_a_sentence_and_the_same_command_goes_on(rows, tmp_path, monkeypatch) -> None:
    target, write, left = tmp_path / "out.jsonl", JsonLines.write, [2]

    def write_while_there_is_room(*args: Any, **settings: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **settings)

    with monkeypatch.context() as full:
        full.setattr(JsonLines, "write", write_while_there_is_room)
        with pytest.raises(SystemExit, match="No space left on device"):
            run(rows, target)
    assert len(answers(target)) == 2
    assert len(run(rows, target)) == len(TEXTS)


def test_who_says_from_which_tokens_to_sample_does_sample(rows, tmp_path) -> None:
    greedily = [answer["output"] for answer in run(rows, tmp_path / "greedily.jsonl")]
    assert [answer["output"] for answer in run(rows, tmp_path / "one.jsonl", "--top-k", "1")] == greedily
    assert [answer["output"] for answer in run(rows, tmp_path / "sampled.jsonl", "--top-p", "0.999")] != greedily
