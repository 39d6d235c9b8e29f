"""A worker: PPO iterations of TRL (its last line with PPO), one for each line it is sent.

    ENV/bin/python benchmarks/trl_ppo.py --model DIR --reward DIR --ids FILE --new 64

Runs in an environment of its own (`ppo_iteration.py` makes it) and knows nothing of ppomax. An
iteration is what the trainer calls an update: generate, four models' scores, `num_ppo_epochs` over
`num_mini_batches` optimizer steps. No stop token, so that every reply has `--new` tokens. Gradient
checkpointing, which TRL switches on by default, is off, as are its sample tables: both cost time.
`--dtype bfloat16` loads weights in bfloat16, for its `bf16=True` changes nothing in this trainer.
"""

import argparse
import json
import os
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from common import DTYPES, Caller, peak_memory_gb, versions
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--ids", required=True, help="JSON: token ids of each prompt")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--micro", type=int, help="replies per forward; default all")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    caller = Caller()
    torch.set_num_threads(given.threads)
    with open(given.ids, encoding="utf-8") as file:  # noqa: PTH123
        prompts = json.load(file)
    count = len(prompts)
    micro = given.micro or count // given.minibatches
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    dtype = DTYPES[given.dtype]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype) for _ in range(2)
    )
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(given.reward, num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    seconds = {}
    generation = ppo_trainer.batch_generation

    def timed(*args, **keywords):
        began = time.perf_counter()
        found = generation(*args, **keywords)
        seconds["rollout"] = time.perf_counter() - began
        return found

    ppo_trainer.batch_generation = timed

    class Answering(TrainerCallback):
        """Says how long an update took, and waits for the next to be asked for."""

        began = 0.0

        def on_train_begin(self, *_, **__):
            caller.say(ready=True, **versions())
            caller.wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            whole = time.perf_counter() - self.began
            caller.say(seconds=whole, peak_gb=peak_memory_gb(), **seconds)
            caller.wait()
            self.began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=count // micro,
            num_mini_batches=given.minibatches,
            num_ppo_epochs=given.epochs,
            local_rollout_forward_batch_size=count,
            response_length=given.new,
            temperature=1.0,
            total_episodes=10_000 * count,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            bf16=False,
            num_sample_generations=0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10_000,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            eval_dataset=Dataset.from_dict({"input_ids": prompts}),
            callbacks=[Answering()],
        )
        trainer.train()


if __name__ == "__main__":
    main()
