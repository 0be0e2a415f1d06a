"""An evaluation harness (lm-eval) whose generation runs on this engine.

    pip install -c tests/constraints.txt ".[examples]"
    python examples/evaluate.py
    python examples/evaluate.py --model Qwen/Qwen3-0.6B --tasks gsm8k --limit 64

Runs each task with plain `generate` and with the engine, and prints the scores, and how long either generated. By
default the model is tiny and the task, sums of two numbers, is made on the spot: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

import transformers_async_cb


def sums(folder: str, count: int = 24) -> dict[str, Any]:
    """A task of lm-eval's, on a file of its own."""
    rng, path = random.Random(0), Path(folder) / "sums.jsonl"
    with path.open("w") as file:
        for _ in range(count):
            a, b = rng.randrange(1000), rng.randrange(10)
            file.write(json.dumps({"question": f"{a}+{b}=", "answer": str(a + b)}) + "\n")
    return {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "="], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


class Stopwatch:
    """Calls a function, and knows how often and for how long."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls, self.seconds = function, 0, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.calls += 1
            self.seconds += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a hub name; a tiny random model by default")
    parser.add_argument("--tasks", nargs="+", help="tasks that lm-eval knows; sums by default")
    parser.add_argument("--limit", type=int, help="examples of each task, at most")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()

    model, tokenizer = tiny.load(arguments.model)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size, backend="causal")
    plain, answers = model.generate, {}
    ways = {"generate": plain, "engine": functools.partial(plain, custom_generate=transformers_async_cb.generate)}
    with tempfile.TemporaryDirectory() as folder:
        tasks = arguments.tasks or [sums(folder)]
        for way, generate in ways.items():
            model.generate = watch = Stopwatch(generate)
            report = simple_evaluate(lm, tasks=tasks, limit=arguments.limit, bootstrap_iters=0)
            answers[way] = {task: [s["resps"] for s in samples] for task, samples in report["samples"].items()}
            for task, scores in report["results"].items():
                numbers = {name: float(score) for name, score in scores.items() if isinstance(score, float)}
                print(f"{way}: {task} {numbers}")
            print(f"{way}: {watch.seconds:.2f} s in {watch.calls} calls of generate")
    for task, plainly in answers["generate"].items():
        same = sum(a == b for a, b in zip(plainly, answers["engine"][task], strict=True))
        print(f"{same} of {len(plainly)} answers to {task} are the same")


if __name__ == "__main__":
    main()
