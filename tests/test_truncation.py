"""Rare rules for what may be drawn: against transformers' own warpers, and in place, for the rows that use them."""

from __future__ import annotations

import pytest
import torch
from conftest import batching, greedy
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.logits_process import TopHLogitsWarper

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.request import Sampling
from transformers_async_cb.runner import Runner
from transformers_async_cb.sampling import TRUNCATED_WORDS, truncate, truncation


WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_h": TopHLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
SETTINGS = [
    {"typical_p": 0.1}, {"typical_p": 0.5}, {"typical_p": 0.95}, {"epsilon_cutoff": 1e-4}, {"epsilon_cutoff": 0.5},
    {"eta_cutoff": 3e-4}, {"eta_cutoff": 0.3}, {"top_h": 0.3}, {"top_h": 0.9}, {"temperature": 2.0, "top_h": 0.4},
    {"top_h": 0.4, "top_k": 5}, {"top_k": 50, "typical_p": 0.3}, {"top_p": 0.9, "typical_p": 0.6},
    {"typical_p": 0.3, "epsilon_cutoff": 0.1}, {"temperature": 0.5, "typical_p": 0.3, "eta_cutoff": 0.6},
    {"temperature": 3.0, "top_h": 0.8, "top_k": 100, "top_p": 0.95, "min_p": 1e-3, "typical_p": 0.7,
     "epsilon_cutoff": 0.02, "eta_cutoff": 0.05},
]  # fmt: skip


def logits_of(rows: int, vocabulary: int, scale: float = 4) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * scale


def words_of(*rows: tuple[int, dict]) -> torch.Tensor:
    """What the device is told: which rows, by which settings."""
    words = torch.full((len(rows), TRUNCATED_WORDS), -1, dtype=torch.int32)
    for line, (row, settings) in zip(words, rows, strict=True):
        line[0] = row
        if row >= 0:
            line[1:] = torch.from_numpy(Sampling(**{"temperature": 1.0, **settings}).truncation())
    return words.view(-1)


def warped(logits: torch.Tensor, settings: dict) -> torch.Tensor:
    """What `generate` draws from, where `settings` are in its order; in float64 but for `eta`, whose cutoff is not."""
    warpers = LogitsProcessorList(WARPERS[name](value) for name, value in settings.items() if name != "eta_cutoff")
    scores = warpers(None, logits.double())
    return WARPERS["eta_cutoff"](settings["eta_cutoff"])(None, scores.float()) if "eta_cutoff" in settings else scores


@pytest.mark.parametrize("scale", [4, 1, 0.1], ids=["sharp", "soft", "flat"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_tokens_left_are_those_that_the_warpers_leave(settings: dict, scale: float) -> None:
    logits = logits_of(20, 1000, scale)
    truncated = logits.clone()
    truncate(truncated, words_of(*((row, settings) for row in range(20))))
    left = truncated > -torch.inf
    assert torch.equal(left, warped(logits, settings) > -torch.inf)
    assert torch.equal(truncated[left], logits[left])


def test_only_the_rows_that_are_named_are_touched_in_whatever_order_and_number(monkeypatch) -> None:
    monkeypatch.setattr(truncation, "_SLICE", 2 * 300)  # two rows at once
    logits = logits_of(8, 300)
    rows = [5, -1, 0, 7, -1, -1, 2]
    truncated = logits.clone()
    truncate(truncated, words_of(*((row, SETTINGS[row]) for row in rows)))
    for row, (before, after) in enumerate(zip(logits, truncated, strict=True)):
        if row in rows:
            assert torch.equal(after > -torch.inf, warped(before[None], SETTINGS[row])[0] > -torch.inf)
        else:
            assert torch.equal(after, before)


def test_of_equally_likely_tokens_top_h_takes_the_lowest_ids() -> None:
    logits = torch.zeros(1, 300)
    truncate(logits, words_of((0, {"top_h": 0.25})))
    assert (logits[0] > -torch.inf).nonzero()[:, 0].tolist() == list(range(25))


def test_a_token_is_left_where_none_is_good_enough() -> None:
    logits = torch.tensor([[0.0, 0.0, 1.0, 0.5]]).repeat(3, 1)
    truncate(logits, words_of((0, {"epsilon_cutoff": 0.99}), (1, {"eta_cutoff": 0.99}), (2, {"top_h": 1e-6})))
    assert [row.nonzero()[:, 0].tolist() for row in logits > -torch.inf] == [[2]] * 3


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
def test_a_step_in_which_nobody_uses_one_is_as_it_was(llama, monkeypatch, overlap: bool) -> None:
    flavours, key_for = [], Runner.key_for
    monkeypatch.setattr(
        Runner, "key_for", lambda self, plan: flavours.append((key := key_for(self, plan)).flavour) or key
    )
    manager = llama.init_continuous_batching(
        greedy(9), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
    )
    manager.add_request([1, 2, 3], do_sample=True, top_k=5)
    manager.add_request([4, 5, 6], max_new_tokens=4, do_sample=True, top_k=5, typical_p=0.5)
    manager.start()
    manager.stop()
    assert [flavour.truncated for flavour in flavours] == [1] * 4 + [0] * 5
    assert all(flavour.filtered for flavour in flavours)


def test_a_row_that_changes_hands_forgets_them(llama) -> None:
    with llama.continuous_batching_context_manager(
        greedy(6), continuous_batching_config=batching(max_requests_per_batch=1), async_batching=True
    ) as manager:
        outputs = []
        for own in ({"top_h": 1e-6}, {}, {"top_k": 0}, {"top_k": 0, "epsilon_cutoff": 0.99}, {"top_k": 0}):
            request_id = manager.add_request([1, 2, 3], do_sample=bool(own), temperature=9.0, seed=1, **own)
            outputs.append(manager.get_result(request_id).generated_tokens)
    narrow, likeliest, wide, cut, wide_again = outputs
    assert narrow == likeliest == cut
    assert wide == wide_again != narrow


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gpu_leaves_the_same_tokens(dtype: torch.dtype) -> None:
    logits = logits_of(len(SETTINGS) * 2, 50_000).to(dtype)
    words = words_of(*((row, SETTINGS[row // 2]) for row in range(len(logits))))
    there = logits.cuda()
    truncate(there, words.cuda())
    truncate(logits, words)
    assert torch.equal(there.cpu(), logits)
