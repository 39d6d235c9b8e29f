"""Several reward models from one command: the same data, each from a seed of its own.

Coste et al. 2023 (2310.02743): where members disagree, the score of a reply is not to be trusted.
Each member is a whole run in `member-0/`, `member-1/`, ...; what is exported is a folder that any
loader takes for the first member, with all of them inside and `ensemble.json` naming them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ppomax import rundir
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, barrier
from ppomax.losses import pairwise_ranking_loss
from ppomax.metrics import as_row
from ppomax.models.ensembles import ENSEMBLE_FILE
from ppomax.models.folders import atomic_folder
from ppomax.models.load import load_reward_model, load_tokenizer
from ppomax.train.loop import StageRun, is_done
from ppomax.train.reward_data import RewardConfig, load_data
from ppomax.train.scoring import score_pairs


def train_members(
    config: RewardConfig,
    here: World,
    run: StageRun,
    train_one: Callable[[RewardConfig, bool], Path],
    *,
    resume: bool,
) -> Path:
    """Train what is not finished, export all, log what they say together.

    Args:
        train_one: trains one member's settings; the flag says to resume.

    Raises:
        Interrupted: a signal asked to stop; finished members are kept.
    """
    run.restore([])
    members = [member_config(config, index) for index in range(config.ensemble or 1)]
    for member in members:
        if not (resume and is_done(member.out)):
            train_one(member, resume and (member.out / rundir.CONFIG).exists())
        if run.stop_asked():
            raise run.interrupt()
    together = disagreement(config, members, here)
    if here.is_main:
        _export(members, run.path / "export")
        for step, values in _mean_rows(members, together):
            row = as_row("reward", step, run.attempt, 0.0, values)
            rundir.append_jsonl(run.path / rundir.METRICS, [row])
    barrier(here)
    return run.finish()


def member_config(config: RewardConfig, index: int) -> RewardConfig:
    """Settings of one member: its head and the order of its data come from its own seed."""
    own = {"out": config.out / f"member-{index}", "seed": config.seed + index, "ensemble": None}
    return config.model_copy(update=own)


def disagreement(
    config: RewardConfig, members: list[RewardConfig], here: World
) -> dict[str, float]:
    """Of all held-out answers: the members' spread, and the loss and accuracy of their mean."""
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    pairs = load_data(config, ChatTemplate(tokenizer, config.system)).heldout
    if not pairs:
        return {}
    pad = int(tokenizer.pad_token_id)
    scores = []
    for member in members:
        model = load_reward_model(
            str(member.out / "export"),
            dtype=config.compute_dtype,
            init_from_lm=False,
            trust_remote_code=config.trust_remote_code,
        ).to(here.device)
        scores.append(torch.stack(score_pairs(model, pairs, pad, config, here)))
    every = torch.stack(scores)  # members, sides, pairs
    chosen, rejected = every.mean(0)
    found = pairwise_ranking_loss(chosen, rejected, num_pairs=len(pairs))
    return {
        "ensemble/score_std": float(every.std(0).mean()),
        "ensemble/accuracy": float(found.accuracy),
        "ensemble/loss": float(found.loss),
    }


def _export(members: list[RewardConfig], folder: Path) -> None:
    with atomic_folder(folder) as place:
        shutil.copytree(members[0].out / "export", place, dirs_exist_ok=True)
        names = [member.out.name for member in members]
        for member, name in zip(members, names, strict=True):
            shutil.copytree(member.out / "export", place / name)
        rundir.write_text(place / ENSEMBLE_FILE, json.dumps({"members": names}) + "\n")


def _mean_rows(
    members: list[RewardConfig], together: dict[str, float]
) -> list[tuple[int, dict[str, float]]]:
    """The members' metrics, averaged step by step as far as all of them went."""
    by_member = [
        {row["step"]: row for row in rundir.read_jsonl(member.out / rundir.METRICS)}
        for member in members
    ]
    steps = sorted(set.intersection(*(set(rows) for rows in by_member)))
    means = []
    for step in steps:
        rows = [rows[step] for rows in by_member]
        shared = [key for key in rows[0] if "/" in key and all(key in row for row in rows)]
        values = {key: sum(row[key] for row in rows) / len(rows) for key in shared}
        means.append((step, values | (together if step == steps[-1] else {})))
    return means
