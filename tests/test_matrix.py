"""Architectures of every family answer what `model.generate` does, each tried in a process of its own."""

from __future__ import annotations

import json

import pytest

from transformers_async_cb.cli import main
from transformers_async_cb.matrix import Verdict, judge, judge_all, model_types
from transformers_async_cb.sampling import reference


# One of each family. On pages: rotary and learned positions, windows, latent attention, experts, post-norm, sinks,
# chunks.
ON_PAGES = ("llama", "gpt2", "gemma3_text", "cohere2", "deepseek_v3", "mixtral", "roberta", "gpt_oss", "llama4_text")
# With a state for each row: state spaces, hybrids with gated delta nets, convolutions and state spaces.
WITH_STATES = ("mamba", "qwen3_next", "lfm2", "zamba2")
# Exact on whichever path: position biases, recurrence, caches of a kind of their own, and soft caps, which `generate`
# leaves out with some versions' attention.
EXACT = ("bloom", "rwkv", "xlnet", "gpt_neo", "gemma2")


# Models that see, given text: positions in three dimensions, a hybrid; and encoder-decoders, which run one at a time.
MULTIMODAL = ("qwen2_vl (multimodal)", "gemma3 (multimodal)")
HYBRID_MULTIMODAL = ("qwen3_5 (multimodal)",)
ENCODER_DECODER = ("t5 (encoder-decoder)", "marian (encoder-decoder)")


def test_families_that_are_exact_stay_so() -> None:
    every = (*ON_PAGES, *MULTIMODAL, *WITH_STATES, *HYBRID_MULTIMODAL, *EXACT, *ENCODER_DECODER)
    verdicts = list(judge_all(every, jobs=2))
    assert [(v.model_type, v.verdict, v.why) for v in verdicts if v.verdict != "exact"] == []
    how = {v.model_type: v.how for v in verdicts}
    assert set(how) == set(every)
    assert {how[name] for name in ON_PAGES + MULTIMODAL} == {"pages"}
    assert {how[name] for name in WITH_STATES + HYBRID_MULTIMODAL} == {"states", "states and pages"}
    assert {how[name] for name in ENCODER_DECODER} == {"one at a time"}


def test_every_model_type_that_transformers_lists_is_tried() -> None:
    assert len(model_types()) > 180
    assert {*ON_PAGES, *WITH_STATES, *EXACT} <= set(model_types())
    assert {*MULTIMODAL} <= set(model_types("multimodal"))
    assert {*ENCODER_DECODER} <= set(model_types("encoder-decoder"))


def test_a_wrong_answer_is_seen(monkeypatch) -> None:
    pick = reference.pick
    monkeypatch.setattr(reference, "pick", lambda logits, *rest: pick(-logits, *rest))
    assert judge("llama").verdict == "wrong"


def test_a_model_that_takes_too_long_has_failed() -> None:
    hung = list(judge_all(["llama"], patience=0.01))
    assert [(v.verdict, v.why) for v in hung] == [("failed", "did not end within 0.01 s")]


def test_the_command_names_a_model_type_that_is_not_listed() -> None:
    with pytest.raises(SystemExit, match=r"lists no llama \(encoder-decoder\)"):
        main(["models", "--task", "encoder-decoder", "--only", "t5", "llama"])


def test_the_command_saves_the_table_and_fails_where_a_model_does(tmp_path, monkeypatch, capsys) -> None:
    verdicts = [Verdict("mamba", "exact"), Verdict("llama", "wrong", "4 of 4", "pages", 1.0)]
    monkeypatch.setattr("transformers_async_cb.cli.models.judge_all", lambda *_: iter(verdicts))
    with pytest.raises(SystemExit, match="1"):
        main(["models", "--only", "llama", "mamba", "--json", str(tmp_path / "models.json")])
    record = json.loads((tmp_path / "models.json").read_text())
    assert record["counts"] == {"exact": 1, "wrong": 1}
    assert [model["model_type"] for model in record["models"]] == ["llama", "mamba"]
    assert "1 wrong" in capsys.readouterr().out
