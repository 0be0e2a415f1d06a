"""A trainer (TRL's GRPO) whose generation runs on this engine, on the weights that it trains.

    pip install -c tests/constraints.txt ".[examples]"
    python examples/rl_grpo.py
    python examples/rl_grpo.py --model Qwen/Qwen3-0.6B --steps 20

By default the model is tiny, the prompts are made on the spot, and two steps are taken: nothing is downloaded. The
reward is the share of digits in an answer.
"""

from __future__ import annotations

import argparse
import functools
import random
import tempfile

import tiny
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import transformers_async_cb


def digits(completions: list[str], **kwargs: object) -> list[float]:
    """The share of digits in each answer."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a hub name; a tiny random model by default")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()

    model, tokenizer = tiny.load(arguments.model)
    rng = random.Random(0)
    prompts = Dataset.from_list([{"prompt": f"{rng.randrange(100)}+{rng.randrange(100)}="} for _ in range(64)])
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, max_steps=arguments.steps, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=arguments.new_tokens, learning_rate=1e-3, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(model, digits, settings, train_dataset=prompts, processing_class=tokenizer)
        model.generate = functools.partial(model.generate, custom_generate=transformers_async_cb.generate)
        trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            print(f"step {entry['step']}: reward {entry['reward']:.3f}")
    model.destroy_cached_continuous_batching_manager()


if __name__ == "__main__":
    main()
