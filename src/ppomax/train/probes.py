"""Probe texts: a reward model's fingerprint, taken at export and taken again when PPO starts."""

import torch

from ppomax.data.batching import collate
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.models.heads import ScalarModel
from ppomax.train.micro_batches import autocast
from ppomax.types import Message, Messages

PROBES = (
    ("What is a good way to start the day?", "A glass of water and a short walk wake you up well."),
    ("What is a good way to start the day?", "No idea. Ask someone else."),
    ("怎么泡绿茶？", "水烧开后晾到八十度，放三克茶叶，泡两分钟就可以喝了。"),
)
"""Texts scored at export and again when PPO starts, so that a changed template is noticed."""


def probe_messages() -> list[tuple[Message, ...]]:
    """The probe dialogues."""
    return [
        (Message(role="user", content=question), Message(role="assistant", content=answer))
        for question, answer in PROBES
    ]


@torch.no_grad()
def score_dialogues(
    model: ScalarModel,
    dialogues: list[Messages],
    template: ChatTemplate,
    here: World,
    dtype: torch.dtype,
) -> list[float]:
    """Score of each dialogue alone, read at the answer's last token (every rank computes all)."""
    scores = []
    pad = int(template.tokenizer.pad_token_id)
    for dialogue in dialogues:
        ids = template.prompt(dialogue[:-1]) + template.answer(dialogue[-1]["content"])
        batch = collate([(ids, [False] * len(ids))], pad, here.device)
        with autocast(here, dtype):
            scores.append(float(model.scores(batch.input_ids, batch.lengths)))
    return scores
