"""The commands, as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest
import torch
from conftest import new_model
from rich import console

from transformers_async_cb import bench, cli, shapes
from transformers_async_cb.bench import picture
from transformers_async_cb.cli import bench as bench_command
from transformers_async_cb.cli import demo


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


class TestDemo:
    def test_compares_every_request_with_generate(self, capsys) -> None:
        cli.main(["demo", "--requests", "5", "--new-tokens", "6", "--device", "cpu"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("tiny in float32"), "no bar, nor room for one, where there is no terminal"
        for name in ("overlap on", "overlap off"):
            (row,) = [line for line in lines if name in line]
            assert "5 of 5" in row
            assert "30" in row.split()

    def test_says_so_and_fails_when_tokens_differ(self, monkeypatch, capsys) -> None:
        model = shapes.load("tiny", "cpu", torch.float32)
        other = shapes.load("tiny", "cpu", torch.float32, seed=1)
        monkeypatch.setattr(model, "generate", other.generate)
        monkeypatch.setattr(shapes, "load", lambda *_: model)
        with pytest.raises(SystemExit, match="do not match"):
            cli.main(["demo", "--requests", "3", "--new-tokens", "8", "--device", "cpu"])
        assert "0 of 3" in capsys.readouterr().out

    def test_takes_a_folder(self, tmp_path, capsys) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = sorted({word for text in demo._TEXTS for word in text.split()})
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words])}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path)
        new_model("qwen3").save_pretrained(tmp_path)
        cli.main(["demo", "--model", str(tmp_path), "--requests", "7", "--new-tokens", "5", "--device", "cpu"])
        assert capsys.readouterr().out.count("7 of 7") == 2


class TestBench:
    def test_measures_engines_side_by_side(self, monkeypatch, tmp_path, capsys) -> None:
        monkeypatch.setitem(bench.WORKLOADS, "small", bench.Workload(4, (3, 9), (5, 5)))
        file = tmp_path / "results.json"
        cli.main(["bench", "small", "--device", "cpu", "--repeats", "2", "--json", str(file)])
        record = json.loads(file.read_text())
        out = capsys.readouterr().out
        assert [result["engine"] for result in record["results"]] == ["ours", "ours-no-overlap", "transformers"]
        for result in record["results"]:
            assert result["tokens"] == 20
            assert len(result["seconds"]) == 2
            assert any(result["engine"] in line.split() for line in out.splitlines())

    def test_takes_lengths_of_its_own_and_draws_a_picture(self, tmp_path, capsys) -> None:
        file, plot = tmp_path / "results.json", tmp_path / "results.png"
        cli.main([
            "bench", "wide", "--device", "cpu", "--engines", "ours", "generate", "--requests", "5", "--prompt-tokens",
            "2-7", "--new-tokens", "3", "--repeats", "1", "--json", str(file), "--plot", str(plot),
        ])  # fmt: skip
        record = json.loads(file.read_text())
        assert [record[name] for name in ("requests", "prompt_tokens", "new_tokens")] == [5, [2, 7], [3, 3]]
        assert record["workload"] == "own lengths"
        ours, padded = record["results"]
        assert ours["tokens"] == padded["tokens"] == 15
        assert ours["tokens_per_second"] == pytest.approx(15 / ours["seconds"][0])
        assert 0 < ours["gpu_active"] <= 1
        assert ours["steps"] >= 3
        assert padded["step_ms"] is None
        assert ours["of_limit"] is record["limit_seconds"] is None  # on a CPU
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert "2 to 7 prompt tokens, 3 new tokens" in " ".join(capsys.readouterr().out.split())

    def test_shows_the_share_of_the_limit(self, tmp_path, capsys) -> None:
        result = {"engine": "ours", "tokens": 100, "tokens_per_second": 50.0, "of_limit": 0.25}
        record = {
            "workload": "small", "lengths": "", "model": "tiny", "dtype": "bfloat16", "environment": "",
            "limit_seconds": 0.5, "results": [result],
        }  # fmt: skip
        console.Console().print(bench_command.result_table(record, "cuda"))
        assert "25%" in capsys.readouterr().out
        picture.draw(str(tmp_path / "limit.svg"), record)
        assert (tmp_path / "limit.svg").stat().st_size > 0

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--engines", "ours", "vllm"], "pip install vllm"),
            (["--plot", "x.png"], r"pip install 'transformers-async-cb\[plot\]'"),
            (["--new-tokens", "9-2"], "'9-2' goes down"),
            (["--requests", "0"], "'0' is not a number of 1 or more"),
        ],
    )
    def test_says_at_once_what_cannot_be(self, monkeypatch, capsys, arguments: list[str], reason: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            cli.main(["bench", *arguments])
        assert re.search(reason, capsys.readouterr().err)

    def test_goes_on_after_an_engine_that_fails(self, monkeypatch, tmp_path, capsys) -> None:
        file = tmp_path / "results.json"
        with pytest.raises(SystemExit) as end:  # transformers' overlap needs a GPU
            cli.main([
                "bench", "--device", "cpu", "--engines", "transformers-async", "ours", "--requests", "2",
                "--new-tokens", "2", "--repeats", "0", "--json", str(file),
            ])  # fmt: skip
        assert end.value.code == 1
        failed, ours = json.loads(file.read_text())["results"]
        assert "cuda" in failed["error"]
        assert ours["tokens"] == 4
        assert "transformers-async failed" in capsys.readouterr().out

    def test_gives_each_request_its_own_limit(self, monkeypatch) -> None:
        model = shapes.load("tiny", "cpu", torch.float32)
        workload = bench.Workload(6, (3, 9), (2, 8))
        assert len(set(workload.limits())) > 1
        result = bench.measure(model, "ours", workload, repeats=0)
        assert result.tokens == sum(workload.limits())
        assert len(result.seconds) == 1

    def test_measures_the_host_alone(self, monkeypatch, tmp_path, capsys) -> None:
        monkeypatch.setattr(bench, "HOST_SIZES", (3, 40))
        file = tmp_path / "host.json"
        cli.main(["bench", "host", "--repeats", "1", "--json", str(file)])
        record = json.loads(file.read_text())
        out = capsys.readouterr().out
        for column in ("host_ms", "host_ms_busy"):
            assert list(record[column]) == ["3", "40"]
            assert all(f"{milliseconds:.3f}" in out for milliseconds in record[column].values())
        assert f"{record['admission_ms']:.1f} ms" in out

    def test_does_not_measure_requests_that_fail(self) -> None:
        model = new_model("gpt2")
        with pytest.raises(RuntimeError, match="1 of 1 requests failed"):
            bench.measure(model, "ours", bench.Workload(1, (500, 500), (40, 40)), repeats=0)


def test_python_m_is_the_command_too(monkeypatch, capsys) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["transformers-async-cb", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("transformers_async_cb", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.strip()


class TestWrongArguments:
    """End in a sentence, before anything is computed."""

    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shapes.AutoModelForCausalLM, "from_config", None)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["demo", "--device", "nope"], "'nope' is no device here"),
            (["doctor", "--device", "meta"], "'meta' is no device here"),
            (["bench", "--dtype", "foo"], "'foo' .choose from 'float32'"),
            (["demo", "--dtype", "load"], "'load' .choose from 'float32'"),
            (["demo", "--new-tokens", "0"], "'0' is not a number of 1 or more"),
            (["bench", "--repeats", "-1"], "'-1' is not a number of 0 or more"),
            (
                ["bench", "--json", "nowhere/x.json"],
                "cannot be written: there is no folder 'nowhere'",
            ),
            (["models", "--json", "."], "'.' cannot be written"),
            (["timeline", "nowhere/x.json"], "'nowhere/x.json' cannot be written"),
            (["run", "in", "out", "--temperature", "-1"], "'-1' is not a number of 0 or more"),
            (["run", "in", "out", "--set", "num_return_sequences=2"], "a row gets one answer"),
            (["serve", "x", "--port", "99999"], "'99999' is not a number from 0 to 65535"),
            (["serve", "x", "--memory", "5"], "'5' is not a number from 0 to 1"),
            (["serve", "x", "--grace", "nan"], "'nan' is not a number of 0 or more"),
        ],
    )
    def test_are_told_by_name(self, monkeypatch, tmp_path, capsys, arguments: list[str], reason: str) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2
        assert re.search(reason, capsys.readouterr().err)

    @pytest.mark.parametrize("command", ["demo", "bench", "doctor", "timeline", "run", "serve"])
    def test_a_model_that_is_none_is_told_in_a_line(self, tmp_path, monkeypatch, command: str) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
        (tmp_path / "model").mkdir()
        given = {"run": ["in.jsonl", "out.jsonl", "--model", "model"], "serve": ["model"]}
        with pytest.raises(SystemExit, match=r"\A'model' cannot be loaded: .*") as end:
            cli.main([command, *given.get(command, ["--model", "model"]), "--device", "cpu"])
        assert "\n" not in end.value.code


def test_a_server_of_a_model_without_room_says_so_and_ends(tmp_path, monkeypatch) -> None:
    pytest.importorskip("uvicorn")
    new_model("llama").save_pretrained(tmp_path)
    shapes.load_tokenizer("tiny").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="no memory for the cache"):
        cli.main(["serve", str(tmp_path), "--device", "cpu", "--memory", "0"])


def test_the_doctor_measures_no_longer_requests_than_there_is_room_for() -> None:
    with pytest.raises(SystemExit, match="--length 1000000000000: the cache has room for"):
        cli.main(["doctor", "--device", "cpu", "--length", "1000000000000"])


def test_an_interrupted_command_ends_with_a_word(monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "load", interrupt)
    with pytest.raises(SystemExit, match="130"):
        cli.main(["demo", "--device", "cpu"])
    assert capsys.readouterr().err.endswith("interrupted\n")
