"""Reinforcement learning on one copy of the weights: generate, train on what came out, generate with the new weights.

A tiny model learns to say even tokens: samples of one prompt are rewarded by how many they have, and REINFORCE with
the group's mean as baseline makes the better ones likelier. While the optimizer works, the manager sleeps, and the
memory of its keys and values is the trainer's.
"""

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import transformers_async_cb  # noqa: F401  (adds async_batching)


GROUP, PROMPT, NEW_TOKENS, ROUNDS = 32, [1, 2, 3], 8, 20

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
sampling = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS)
batching = ContinuousBatchingConfig(num_blocks=8, seed=0)


def train(answers: torch.Tensor, rewards: torch.Tensor) -> None:
    """One step on answers `[GROUP, NEW_TOKENS]`."""
    ids = torch.cat([torch.tensor(PROMPT).expand(GROUP, -1), answers], dim=1)
    logits = model(ids).logits[:, len(PROMPT) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    loss = -((rewards - rewards.mean())[:, None] * logprobs).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


with model.continuous_batching_context_manager(
    sampling, continuous_batching_config=batching, async_batching=True
) as manager:
    for round_ in range(ROUNDS):
        requests = manager.add_requests([PROMPT] * GROUP)
        answers = torch.tensor([manager.get_result(request).generated_tokens for request in requests])
        rewards = (answers % 2 == 0).float().mean(-1)
        print(f"round {round_}: {rewards.mean():.0%} of the tokens are even")
        manager.sleep()
        train(answers, rewards)
        manager.wake()
