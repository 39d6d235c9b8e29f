"""A worker: the PPO loop one would write with `transformers` and torch, one iteration a line.

Generate, four forwards, GAE, clipped losses, AdamW for policy and critic; all replies in one batch,
nothing tuned. What `tiny.py` measures ppomax against.
"""

import argparse
import json
import os
import time

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from common import Caller, peak_memory_gb
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

KL, CLIP, LAM = 0.05, 0.2, 0.9


def log_probs(model, ids, start):
    """Of the tokens from `start` on."""
    logits = model(input_ids=ids).logits[:, start - 1 : -1]
    return logits.log_softmax(-1).gather(2, ids[:, start:, None]).squeeze(2)


def scalars(model, ids):
    """The head's number at every position."""
    hidden = model.base_model(input_ids=ids).last_hidden_state
    return model.score(hidden).squeeze(2)


def gae(rewards, values):
    """Advantages with discount 1."""
    advantages, last = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + following - values[:, t] + LAM * last
        advantages[:, t] = last
    return advantages


def step(optimizer, model, loss):
    """One optimizer step under a clipped gradient norm."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--ids", required=True, help="JSON: token ids of each prompt")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    caller = Caller()
    torch.set_num_threads(given.threads)
    with open(given.ids, encoding="utf-8") as file:  # noqa: PTH123
        prompts = torch.tensor(json.load(file))
    start = prompts.shape[1]
    load = AutoModelForCausalLM.from_pretrained
    policy, reference = (load(given.model, dtype=torch.float32).eval() for _ in range(2))
    load = AutoModelForSequenceClassification.from_pretrained
    critic, reward = (
        load(given.reward, num_labels=1, dtype=torch.float32).eval() for _ in range(2)
    )
    policy_step, critic_step = (
        torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
        for model in (policy, critic)
    )
    caller.say(ready=True)
    while True:
        caller.wait()
        began = time.perf_counter()
        with torch.no_grad():
            ids = policy.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                min_new_tokens=given.new,
                max_new_tokens=given.new,
            )
            rolled = time.perf_counter()
            old = log_probs(policy, ids, start)
            rewards = -KL * (old - log_probs(reference, ids, start))
            values = scalars(critic, ids)[:, start - 1 : -1]
            rewards[:, -1] += scalars(reward, ids)[:, -1]
            advantages = gae(rewards, values)
            returns = advantages + values
        scored = time.perf_counter()
        ratio = (log_probs(policy, ids, start) - old).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
        step(policy_step, policy, -torch.minimum(ratio * advantages, clipped).mean())
        found = scalars(critic, ids)[:, start - 1 : -1]
        near = values + (found - values).clamp(-CLIP, CLIP)
        errors = torch.maximum((found - returns) ** 2, (near - returns) ** 2)
        step(critic_step, critic, 0.5 * errors.mean())
        now = time.perf_counter()
        caller.say(
            seconds=now - began,
            rollout=rolled - began,
            score=scored - rolled,
            update=now - scored,
            peak_gb=peak_memory_gb(),
        )


if __name__ == "__main__":
    main()
