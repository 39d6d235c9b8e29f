r"""A reward written as a Python function, in place of a reward model.

    ppomax run smoke reward=null ppo.critic=policy \
        ppo.reward.callable=examples.reward_callable:reward

There is no reward stage then, and no reward model for the critic to start from. The module is
looked for as Python does, last in the current directory. The function runs in the training process
with your rights. It gets every reply of the rollout (of this rank's share) at once and returns one
number each; None sets a reply aside, an exception is tried again `ppo.reward.retries` times, and
one call may take `ppo.reward.timeout` seconds.

Scores for the steps of a reply rather than for its end, with or without others beside them:

    ppomax run smoke reward=null ppo.critic=policy \
        ppo.reward.process=examples.reward_callable:step_rewards ppo.reward.step_separator=". "
"""

import asyncio
from collections.abc import Sequence
from typing import Any

WANTED_WORDS = 40

Message = dict[str, str]


def reward(
    prompts: Sequence[Sequence[Message]],
    responses: Sequence[str],
    *,
    ids: Sequence[str],
    metadata: Sequence[dict[str, Any]],
) -> list[float | None]:
    """Prefer complete replies of about 40 words that take up the question.

    Args:
        prompts: the dialogue before each reply, oldest message first.
        responses: the replies' texts, without the token that ends them.
        ids: of the prompts' rows in the data.
        metadata: every other column of these rows (`lang`, `kind`, a reference answer, ...).
    """
    return [
        judge(prompt[-1]["content"], response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


async def patient_reward(
    prompts: Sequence[Sequence[Message]], responses: Sequence[str], **_: object
) -> list[float | None]:
    """The same as a coroutine, for scores that have to be waited for: all replies at once."""
    waiting = [
        asyncio.to_thread(judge, prompt[-1]["content"], response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return list(await asyncio.gather(*waiting))


def step_rewards(
    prompts: Sequence[Sequence[Message]], steps: Sequence[Sequence[str]], **_: object
) -> list[list[float]]:
    """Pay for each step that says something its reply has not said yet.

    Args:
        steps: the texts of each reply's steps. One number for each comes back; it is paid on the
            step's last token. None in place of a reply's list sets the reply aside.
    """
    return [
        [0.0 if step in reply[:place] else 0.1 for place, step in enumerate(reply)]
        for reply in steps
    ]


def judge(question: str, answer: str) -> float | None:
    """One reply's score: three parts, each in [0, 1]; None where there is nothing to judge."""
    words = answer.lower().split()
    if not words:
        return None
    length = min(len(words), WANTED_WORDS) / max(len(words), WANTED_WORDS)
    complete = float(answer.rstrip()[-1:] in tuple(".!?。！？"))
    topic = {word for word in question.lower().split() if len(word) > 3}
    on_topic = len(topic & set(words)) / len(topic) if topic else 1.0
    return length + complete + on_topic
