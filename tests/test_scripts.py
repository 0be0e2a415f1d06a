"""Examples that need no more than the package run as they stand."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_bulk_answers_each_prompt_and_draws_its_own_timeline(monkeypatch, capsys, tmp_path) -> None:
    file = tmp_path / "run.svg"
    run(monkeypatch, "bulk.py", "--timeline", str(file))
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 32
    assert all(answer["output"] and answer["error"] is None for answer in answers)
    assert "overlap on" in file.read_text()


def test_chat_streams_several_answers_at_once(monkeypatch, capsys) -> None:
    run(monkeypatch, "chat.py")
    lines = capsys.readouterr().out.splitlines()
    assert sum(": done, " in line for line in lines) == 3
    firsts = [min(i for i, line in enumerate(lines) if line.startswith(f"{n}: '")) for n in range(3)]
    assert max(firsts) < min(i for i, line in enumerate(lines) if ": done, " in line)
