"""One architecture, small and with random weights: the engine's tokens beside those of `model.generate`."""

from __future__ import annotations

import random
import time
import warnings
from typing import NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..config import AsyncBatchingConfig
from ..install import install
from ..manager import CACHED, AsyncBatchingManager
from ..settings import Mode
from .small import FIRST_ORDINARY, SKIPPED, VOCABULARY, small_model


# Of the prompts, in tokens; prompts longer than the budget of a step are computed in chunks.
PROMPT_LENGTHS = (3, 13, 27, 42)
NEW_TOKENS = 24
TOKEN_BUDGET = 20
# Seeds and spreads of weights to try until the answers vary: a model that repeats one token shows nothing.
TRIALS = [(seed, spread) for spread in (0.3, 0.5, 0.1, 0.05) for seed in range(4)]
FEWEST_TOKENS = 4  # that differ, in each answer


# How a model was run, the best first.
MODES = {
    Mode.PAGES: "pages",
    Mode.HYBRID: "states and pages",
    Mode.STATES: "states",
    Mode.SEQUENCES: "one at a time",
}

# Verdicts that should not be.
FAILING = ("wrong", "failed")


class Verdict(NamedTuple):
    """What came of one model type.

    `exact` or `wrong` against `model.generate`; `refused` by the engine; `failed` in any other way, or not to be
    decided; `skipped`: nothing to compare with. `how` it ran, if it did, is one of `MODES`. `why` it is not exact, or
    not packed on pages.
    """

    model_type: str
    verdict: str
    why: str = ""
    how: str = ""
    seconds: float = 0.0


def judge(model_type: str) -> Verdict:
    """Build a small model and compare, in this process."""
    begin = time.perf_counter()
    install()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # models this small lose by more
    verdict = _judge(model_type)
    return verdict._replace(seconds=round(time.perf_counter() - begin, 2))


def _judge(model_type: str) -> Verdict:
    if model_type in SKIPPED:
        return Verdict(model_type, "skipped", SKIPPED[model_type])
    generator = random.Random(0)
    prompts = [[generator.randrange(FIRST_ORDINARY, VOCABULARY) for _ in range(length)] for length in PROMPT_LENGTHS]
    for seed, spread in TRIALS:
        try:
            model = small_model(model_type, seed, spread)
        except Exception as error:
            return Verdict(model_type, "skipped", f"cannot be built small: {_sentence(error)}")
        try:
            expected = [_generate(model, prompt) for prompt in prompts]
        except Exception as error:
            return Verdict(model_type, "skipped", f"model.generate fails on it: {_sentence(error)}")
        if all(len(set(answer)) >= FEWEST_TOKENS for answer in expected):
            break
    else:
        why = f"not to be decided: in {len(TRIALS)} trials, an answer of model.generate was a few tokens repeated"
        return Verdict(model_type, "failed", why)
    return _compare(model_type, model, prompts, expected)


def _compare(model_type: str, model: PreTrainedModel, prompts: list[list[int]], expected: list[list[int]]) -> Verdict:
    try:
        outputs = model.generate_batch(
            prompts,
            generation_config=_greedy(),
            continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=TOKEN_BUDGET),
            async_batching=AsyncBatchingConfig(debug=True),
            persistent_manager=True,
        )
    except ValueError as error:
        return Verdict(model_type, "refused", str(error))
    except Exception as error:
        return Verdict(model_type, "failed", _sentence(error))
    manager: AsyncBatchingManager = getattr(model, CACHED)
    how = MODES[manager.mode]
    why = next((choice.reason for choice in manager.choices if choice.name == "sequences"), "")
    manager.destroy()
    errors = [output.error for output in outputs.values() if output.error is not None]
    if errors:
        return Verdict(model_type, "failed", errors[0], how)
    wrong = sum(output.generated_tokens != answer for output, answer in zip(outputs.values(), expected, strict=True))
    if wrong:
        return Verdict(model_type, "wrong", f"{wrong} of {len(prompts)} answers are not those of model.generate", how)
    return Verdict(model_type, "exact", why, how)


def _greedy() -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)


def _generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=_greedy())
    return answer[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()


def _sentence(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
