"""The examples run as they stand, where the packages are that they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    """What an example prints. It may not ask a hub for anything."""
    process = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_an_evaluation_harness_gets_the_same_answers() -> None:
    pytest.importorskip("lm_eval")
    assert "24 of 24 answers to sums are the same" in run("evaluate.py")


def test_a_trainer_takes_its_steps() -> None:
    pytest.importorskip("trl")
    assert "step 2: reward" in run("rl_grpo.py")
