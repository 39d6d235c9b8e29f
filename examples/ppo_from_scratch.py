"""PPO-max on one page: Zheng et al. 2023 (2307.04964) on a plain transformers model.

    python examples/ppo_from_scratch.py                             # a tiny Llama, made here
    python examples/ppo_from_scratch.py --kl-coef 0 --ptx-coef 0    # the same without constraints
    python examples/ppo_from_scratch.py --model FOLDER_OR_HUB_ID --iterations 20

In 15 seconds on one core the first takes the score from 0.36 to about 0.55, in words of its
language. The second goes to 0.99 by writing "iaeaeaeaeae": the reward curve looks better, KL,
perplexity and length tell (section 5.2, Figure 4).

Only the mathematics is ppomax's (`masked`, `normalise`, `experience`, `advantages`, `losses`); what
surrounds it stands below, plain and slow. There is no reward model: the score is a rule, the share
of vowels in the reply. `ppomax.train.ppo` does the same with four models, micro-batches, ranks,
checkpoints, an engine with a cache, and prompts that have a chat template.

Every tensor is [batch, position]. Position t belongs to token t + 1, the one chosen in the state of
tokens 0..t; `mask` is True where that token is the reply's. Rows are padded on the right, so causal
attention never sees the padding and needs no attention mask.
"""

import argparse
import copy
import random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ppomax.advantages import gae
from ppomax.experience import kl_penalty, perplexity, reparameterize_scores, token_rewards
from ppomax.losses import clipped_policy_loss, clipped_value_loss, explained_variance, lm_loss
from ppomax.masked import masked_mean
from ppomax.normalise import RunningMoments

WORDS = (  # noqa: SIM905 - easier to read
    "aria eerie audio queue ocean idea aloe iris olive agile able unit area quiet echo onion "
    "stone river cloud bread train night plant glass storm brick crisp sprint length rhythm myth"
).split()
"""The tiny model's language: words in any order, some rich in vowels, some poor."""
GAMMA, LAM = 1.0, 0.9  # eq. 9; lambda: App. C.3
CLIP, VALUE_CLIP = 0.2, 0.2  # eq. 15 and 16
REWARD_CLIP = 10.0  # eq. 18
EPOCHS, MINIBATCHES = 1, 2  # a small buffer, used once


class Letters:
    """The tiny model's tokenizer: a-z, space, and the two ids every model needs."""

    alphabet = "abcdefghijklmnopqrstuvwxyz "
    eos_token_id, pad_token_id, size = 27, 28, 29

    def encode(self, text: str) -> list[int]:
        """One id per letter."""
        return [self.alphabet.index(letter) for letter in text]

    def decode(self, ids: list[int], **_: object) -> str:
        """The letters alone."""
        return "".join(self.alphabet[i] for i in ids if i < self.eos_token_id)


class Critic(nn.Module):
    """A value per position: the SFT model's backbone under a linear head that starts at zero."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """V of the state before each token but the first."""
        return self.head(self.backbone(ids).last_hidden_state)[:, :-1, 0].float()


class Rollout(NamedTuple):
    """Prompts with their replies."""

    ids: Tensor
    mask: Tensor
    texts: list[str]


def write_text(choice: random.Random) -> str:
    """Four to six words: what SFT imitates, and the plain text of PPO-ptx."""
    return " ".join(choice.choices(WORDS, k=choice.randint(4, 6)))


def score(text: str) -> float:
    """The reward: share of vowels. Write your own here."""
    return sum(letter in "aeiou" for letter in text.lower()) / max(1, len(text))


def pad_rows(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the right, and their lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows]), lengths


def span_mask(ids: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """True where the token's index is in [first, end): from lengths, never from comparing ids."""
    token = torch.arange(1, ids.shape[1])
    return (first[:, None] <= token) & (token < end[:, None])


@torch.no_grad()
def sample(policy: nn.Module, prompts: list[list[int]], new: int, tok, noise) -> Rollout:
    """One reply per prompt, at temperature 1; EOS belongs to the reply that it ends."""
    blank = [tok.pad_token_id] * new
    ids, lengths = pad_rows([prompt + blank for prompt in prompts], tok.pad_token_id)
    first = lengths - new
    end, rows, running = first.clone(), torch.arange(len(ids)), torch.ones(len(ids)).bool()
    for _ in range(new):
        if not running.any():
            break
        logits = policy(ids).logits[rows, end - 1].float()
        token = torch.multinomial(logits.softmax(-1), 1, generator=noise).squeeze(1)
        ids[rows[running], end[running]] = token[running]
        end = end + running
        running = running & (token != tok.eos_token_id)
    texts = [
        tok.decode(row[a:b].tolist(), skip_special_tokens=True)
        for row, a, b in zip(ids, first, end, strict=True)
    ]
    ids = ids[:, : int(end.max())]
    return Rollout(ids, span_mask(ids, first, end), texts)


def logprobs_of(policy: nn.Module, ids: Tensor) -> Tensor:
    """Log-probability of each token given those before it, in fp32."""
    logits = policy(ids).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)


def text_loss(policy: nn.Module, texts: list[str], tok) -> Tensor:
    """SFT's loss and the second term of eq. 17: mean negative log-likelihood of plain text."""
    rows = [[*tok.encode(text), tok.eos_token_id] for text in texts]
    ids, lengths = pad_rows(rows, tok.pad_token_id)
    mask = span_mask(ids, torch.ones_like(lengths), lengths)
    return lm_loss(logprobs_of(policy, ids), mask, num_tokens=int(mask.sum()))


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Backward, the global norm clipped to 1 (detail 12), one optimizer step."""
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tiny_config(tok: Letters) -> LlamaConfig:
    """Two layers, 64 wide: about 80,000 weights."""
    return LlamaConfig(
        vocab_size=tok.size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def main(argv: list[str] | None = None) -> list[float]:
    """Train, print a line per iteration; returns the mean score of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id of a causal LM; default: built here")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--sft-steps", type=int, default=200)
    parser.add_argument("--critic-rollouts", type=int, default=5)
    parser.add_argument("--replies", type=int, default=64, help="per iteration")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--lr", type=float, help="default 1e-3, with --model 1e-5")
    parser.add_argument("--kl-coef", type=float, default=0.05, help="eta of eq. 19")
    parser.add_argument("--ptx-coef", type=float, default=0.4, help="of eq. 17; 0 with --model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    noise, choice = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    lr = args.lr or (1e-5 if args.model else 1e-3)

    # 0. The SFT model: policy, reference and the critic's backbone start from it. Without SFT there
    #    is nothing to keep to (detail 9). `eval` turns dropout off, or the first ratio is not 1.
    if args.model:
        tok = AutoTokenizer.from_pretrained(args.model)
        policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        if tok.pad_token_id is None:
            tok.pad_token_id = tok.eos_token_id  # any will do: padding is never read
    else:
        tok = Letters()
        policy = LlamaForCausalLM(tiny_config(tok)).eval()
        optimizer = torch.optim.AdamW(policy.parameters(), 3e-3, (0.9, 0.95), eps=1e-6)
        for _ in range(args.sft_steps):
            texts = [write_text(choice) for _ in range(32)]
            take_step(optimizer, text_loss(policy, texts, tok))
    reference, critic = copy.deepcopy(policy).requires_grad_(False), Critic(policy)
    policy_optimizer = torch.optim.AdamW(policy.parameters(), lr, (0.9, 0.95), eps=1e-6)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), 3 * lr, (0.9, 0.95), eps=1e-8)
    moments, history = RunningMoments(), []

    for iteration in range(-args.critic_rollouts, args.iterations):
        pretraining = iteration < 0  # the policy is frozen until the critic has learned (detail 8)

        # 1. Collect replies with the present policy.
        prompts = [tok.encode(choice.choice(WORDS)) for _ in range(args.replies)]
        ids, mask, replies = sample(policy, prompts, args.new_tokens, tok, noise)

        # 2. Score them, and read every token under the policy (old), the reference and the critic.
        scores = torch.tensor([score(reply) for reply in replies])
        with torch.no_grad():
            old_logprobs, ref_logprobs = logprobs_of(policy, ids), logprobs_of(reference, ids)
            old_values = critic(ids)

        # 3. Rewards. The score by the mean and std of all scores so far, this rollout's included,
        #    then clipped (eq. 18, detail 5); per token the KL penalty, on the last one the score
        #    (eq. 19, detail 1).
        moments.update(scores)
        scaled = reparameterize_scores(scores, mean=moments.mean, std=moments.std, clip=REWARD_CLIP)
        rewards = token_rewards(scaled, old_logprobs, ref_logprobs, mask, kl_coef=args.kl_coef)

        # 4. Advantages and returns (eq. 9, detail 10).
        advantages, returns = gae(rewards, old_values, mask, gamma=GAMMA, lam=LAM)

        # 5. Updates, in minibatches; the rollout is dropped afterwards.
        for _ in range(EPOCHS):
            order = torch.randperm(args.replies, generator=noise)
            for rows in order.chunk(MINIBATCHES):
                part, tokens = mask[rows], int(mask[rows].sum())
                if not pretraining:
                    # 5a. Policy: clipped surrogate (eq. 15, detail 11) and, in the same step, the
                    #     likelihood of plain text (PPO-ptx, eq. 17).
                    surrogate = clipped_policy_loss(
                        logprobs_of(policy, ids[rows]), old_logprobs[rows], advantages[rows], part,
                        clip=CLIP, num_tokens=tokens,
                    )  # fmt: skip
                    loss = surrogate.loss
                    if not args.model:
                        texts = [write_text(choice) for _ in rows]
                        loss = loss + args.ptx_coef * text_loss(policy, texts, tok)
                    take_step(policy_optimizer, loss)
                # 5b. Critic: clipped squared error to the returns (eq. 16, detail 7), not clipped
                #     while it is pre-trained.
                value = clipped_value_loss(
                    critic(ids[rows]), old_values[rows], returns[rows], part,
                    clip=None if pretraining else VALUE_CLIP, num_tokens=tokens,
                )  # fmt: skip
                take_step(critic_optimizer, value.loss)

        # 6. Observe. The reward alone does not tell whether training goes well (section 5.2): KL to
        #    the reference, perplexity and length do.
        number = iteration + 1 + args.critic_rollouts * pretraining
        kl = masked_mean(kl_penalty(old_logprobs, ref_logprobs, mask), mask)
        print(
            f"{'critic' if pretraining else 'ppo':<6} {number:>3}"
            f"  score {scores.mean():.3f}  kl {kl:.3f}"
            f"  perplexity {perplexity(old_logprobs, mask):.2f}"
            f"  length {mask.sum() / len(mask):.1f}"
            f"  explained variance {explained_variance(old_values, returns, mask):.2f}"
            f"  | {replies[0]!r}"
        )
        if not pretraining:
            history.append(float(scores.mean()))
    return history


if __name__ == "__main__":
    main()
