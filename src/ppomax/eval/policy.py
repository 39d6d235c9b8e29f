"""Judge a policy against its SFT model: same held-out prompts, same sampling, same seeds.

Scores come from reward models. The one PPO was trained on is the *proxy* and is said to be; a
second one that PPO never saw is `held-out`.
"""

import gc
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ppomax import rundir
from ppomax.config import dump
from ppomax.data.batching import derived_seed, plan_micro_batches
from ppomax.data.sources import load_prompts, split_by_prompt
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, barrier, gather, wait_for_main, world
from ppomax.errors import ConfigError, DataError
from ppomax.eval.capability import evaluate_capability
from ppomax.eval.compare import judged_record
from ppomax.eval.policy_config import EvalConfig, ScorerConfig
from ppomax.eval.replies import pairs_of, say, unique
from ppomax.eval.rubrics import load_rubrics
from ppomax.eval.scorers import ensemble_scores, load_scorer
from ppomax.eval.statistics import paired_difference, wilson_interval, win_tie_lose
from ppomax.experience import kl_penalty
from ppomax.masked import masked_mean
from ppomax.models.export import tokenizer_hash
from ppomax.models.language import LanguageModel, place
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.models.trunk import Trunk, common_depth
from ppomax.rollout import Rollout, build_engine
from ppomax.rollout.engine import merge_rollouts
from ppomax.train.experience_batch import reply_batch, response_mask, unflatten
from ppomax.train.micro_batches import autocast, table_of
from ppomax.train.observe import response_metrics
from ppomax.train.scoring import score_rows
from ppomax.types import PromptRow


@dataclass(frozen=True, slots=True)
class Answers:
    """One model's replies to all prompts, those to one prompt together, and their log-probs."""

    rollout: Rollout
    texts: list[str]
    perplexity: float
    logprobs: torch.Tensor
    """[replies, response] at temperature 1, under the model itself."""
    mask: torch.Tensor


def evaluate_policy(config: EvalConfig) -> Path:
    """Answer, score, compare; writes `report.json` into the run directory and returns it."""
    with world(config.device) as here:
        if config.threads:
            torch.set_num_threads(config.threads)
        if here.is_main:
            config.out.mkdir(parents=True, exist_ok=True)
            rundir.write_text(config.out / rundir.CONFIG, dump(config))
            rundir.write_environment(
                config.out, {"device": str(here.device), "world_size": here.size}
            )
        barrier(here)
        report = compare(config, here)
        if here.is_main:
            text = json.dumps(report, ensure_ascii=False, indent=1)
            rundir.write_text(config.out / "report.json", text + "\n")
            rundir.write_text(config.out / "done.json", "{}\n")
        wait_for_main(here)  # judges may take hours
    return config.out


def compare(config: EvalConfig, here: World) -> dict[str, Any]:
    """The whole comparison as one JSON-ready record."""
    tokenizer = load_tokenizer(config.baseline, trust_remote_code=config.trust_remote_code)
    check_tokenizers(config, tokenizer)
    template = ChatTemplate(tokenizer, config.system)
    rows, prompts, repeated = load_eval_prompts(config, template)
    sft, ppo = (load_model(name, config, here) for name in (config.baseline, config.policy))
    depth = common_depth(sft, ppo) if here.size == 1 else 0
    trunk = Trunk(sft, depth) if depth else None
    if trunk is not None:
        trunk.join(ppo)
    tell(here, f"{config.baseline} answers {len(rows)} prompts")
    sft_answers = answer(sft, rows, prompts, template, config, here)
    tell(here, f"{config.policy} answers them")
    ppo_answers = answer(ppo, rows, prompts, template, config, here)
    under_sft = logprobs_of(sft, ppo_answers.rollout, template, config, here)
    pair = (ppo_answers.logprobs, under_sft, ppo_answers.mask)
    # Of replies drawn otherwise than from the plain policy the mean log-ratio is no KL.
    plain = config.sampling.is_plain and config.sampling.temperature == 1
    kl = {
        f"{'kl_ref' if plain else 'log_ratio'}_{name}": float(
            masked_mean(kl_penalty(*pair, estimator=name), ppo_answers.mask)
        )
        for name in ("k1", "k3")
    }
    del sft, ppo
    scorers, scores, each = [], {}, config.samples_per_prompt
    for scorer in config.scorers:
        tell(here, f"{scorer.name} scores both")
        of_sft, of_ppo = (
            score_replies(scorer, answers, template, config, here, trunk)
            for answers in (sft_answers, ppo_answers)
        )
        scorers.append(compare_scores(scorer, of_sft, of_ppo, sft_answers, ppo_answers, each))
        scores[scorer.name] = {"sft": of_sft, "ppo": of_ppo}
    del trunk
    gc.collect()  # models in a trunk hold on to each other
    first = scores[config.scorers[0].name] if config.scorers else {"sft": [], "ppo": []}
    of_prompts = {name: prompt_means(found, each) for name, found in first.items()}
    return {
        "kind": "policy",
        "baseline": "sft",
        "policy": "ppo",
        "num_prompts": len(rows),
        "samples_per_prompt": each,
        **kl,
        "scorer": {"name": config.scorers[0].name, "role": config.scorers[0].role}
        if config.scorers
        else None,
        "scorers": scorers,
        "policies": {"sft": describe(sft_answers), "ppo": describe(ppo_answers)},
        "by": by_group(rows, of_prompts),
        "samples": samples(rows, sft_answers, ppo_answers, first, config),
        "scores": of_prompts,
        "sampling": config.sampling.model_dump(mode="json"),
        "repeated_prompts": repeated,
        **(judge_and_ask(config, rows, sft_answers, ppo_answers) if here.is_main else {}),
    }


def tell(here: World, line: str) -> None:
    """Say what is being done; one rank does."""
    if here.is_main:
        say(line)


def judge_and_ask(
    config: EvalConfig, rows: list[PromptRow], sft: Answers, ppo: Answers
) -> dict[str, Any]:
    """What judges and questions say, where the settings name any; for one rank."""
    found: dict[str, Any] = {}
    if config.judges:
        texts = {"sft": sft.texts, "ppo": ppo.texts}
        each = config.samples_per_prompt
        pairs = {"ppo": pairs_of(rows, {name: found[::each] for name, found in texts.items()})}
        rubrics = load_rubrics(config.rubrics)
        found |= judged_record(pairs, config.judges, rubrics, config.out, seed=config.seed, say=say)
    if config.capability:
        models = {"sft": config.baseline, "ppo": config.policy} | config.capability_models
        options: dict[str, Any] = {"dtype": config.dtype, "say": say}
        options["keep"] = config.out / "answers"
        options["trust_remote_code"] = config.trust_remote_code
        found["capability"] = evaluate_capability(models, config.capability, **options)
    return found


def check_tokenizers(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replies go from model to model as token ids, so all must read them alike.

    Raises:
        ConfigError: a policy or scorer with another tokenizer than the baseline's.
    """
    names = {"policy": config.policy}
    names |= {f"scorers.{i}.model": scorer.model for i, scorer in enumerate(config.scorers)}
    for setting, name in names.items():
        other = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
        if tokenizer_hash(other) != tokenizer_hash(tokenizer):
            raise ConfigError(
                f"setting eval.{setting}: {name} has another tokenizer or chat template than the "
                f"baseline {config.baseline}; replies are judged as token ids"
            )


def load_eval_prompts(
    config: EvalConfig, template: ChatTemplate
) -> tuple[list[PromptRow], list[list[int]], int]:
    """Rows and prompt ids that fit, each prompt once, and how many were repeats.

    Raises:
        DataError: none does.
    """
    every = load_prompts(config.data, max_bad_rows=config.max_bad_rows).rows
    rows = unique(every)
    repeated = len(every) - len(rows)
    if config.heldout is not None:
        rows = split_by_prompt(rows, config.heldout).heldout
    rows = rows[: config.limit]
    fitted = [(row, template.fit(row.messages, config.max_prompt)) for row in rows]
    kept = [(row, found[1]) for row, found in fitted if found is not None]
    if not kept:
        raise DataError(
            f"setting eval.max_prompt: none of {len(rows)} prompts fits {config.max_prompt} "
            "tokens; raise it"
        )
    return [row for row, _ in kept], [ids for _, ids in kept], repeated


def load_model(name: str, config: EvalConfig, here: World) -> LanguageModel:
    """A frozen policy in the compute dtype."""
    lm = load_policy(name, dtype=config.compute_dtype, trust_remote_code=config.trust_remote_code)
    model = LanguageModel(lm).requires_grad_(False)
    place(model, here)
    return model


def answer(
    model: LanguageModel,
    rows: list[PromptRow],
    prompts: list[list[int]],
    template: ChatTemplate,
    config: EvalConfig,
    here: World,
) -> Answers:
    """Replies to each prompt in turn; their seeds are the same for both models."""
    engine = build_engine(config.engine, model.lm, template, here, config.compute_dtype)
    asked, seeds = [], []
    for index, row in enumerate(rows):
        for nth in range(config.samples_per_prompt):
            asked.append(prompts[index])
            seeds.append(derived_seed(config.seed, "eval", row.id, index, *([nth] if nth else [])))
    mine = here.share(list(range(len(asked))))
    local = engine.generate([asked[i] for i in mine], config.sampling, [seeds[i] for i in mine])
    rollout = merge_rollouts(gather(local, here), len(asked))
    logprobs = logprobs_of(model, rollout, template, config, here)
    mask = response_mask(rollout, here.device)
    perplexity = float(masked_mean(-logprobs, mask).exp())
    return Answers(
        rollout, [template.decode(ids) for ids in rollout.responses], perplexity, logprobs, mask
    )


@torch.no_grad()
def logprobs_of(
    model: LanguageModel, rollout: Rollout, template: ChatTemplate, config: EvalConfig, here: World
) -> torch.Tensor:
    """Log-probs [replies, response] at temperature 1 under the model."""
    mask, pad = response_mask(rollout, here.device), int(template.tokenizer.pad_token_id)

    def read(indices: list[int]) -> torch.Tensor:
        batch = reply_batch(rollout, indices, pad, here.device)
        with autocast(here, config.compute_dtype):
            flat = model(batch).logprobs
        return unflatten(flat, mask[indices])

    plan = plan_micro_batches(rollout.lengths, config.micro_tokens, here.size)
    return table_of(mask.shape, plan, read, here)


def score_replies(
    scorer: ScorerConfig,
    answers: Answers,
    template: ChatTemplate,
    config: EvalConfig,
    here: World,
    trunk: Trunk | None = None,
) -> list[float]:
    """The score of each reply, read at its last token; of an ensemble its members' mean.

    Args:
        trunk: of the models that answered; a scorer that agrees with it begins above it.
    """
    rows, pad = answers.rollout.sequences, int(template.tokenizer.pad_token_id)

    def member(name: str) -> torch.Tensor:
        model = load_scorer(name, config, here)
        if trunk is not None:
            trunk.join(model)
        return score_rows(model, rows, pad, config, here)

    return ensemble_scores(scorer.model, member)


def compare_scores(
    scorer: ScorerConfig,
    sft: list[float],
    ppo: list[float],
    sft_answers: Answers,
    ppo_answers: Answers,
    each: int,
) -> dict[str, Any]:
    """Paired difference and win/tie/lose of one scorer; equal replies tie despite rounding.

    Args:
        sft: a score for each reply; those to one prompt count as their mean.
        each: replies to a prompt.
    """
    same = [
        a == b
        for a, b in zip(sft_answers.rollout.responses, ppo_answers.rollout.responses, strict=True)
    ]
    ppo = [s if equal else p for s, p, equal in zip(sft, ppo, same, strict=True)]
    sft, ppo = prompt_means(sft, each), prompt_means(ppo, each)
    difference = paired_difference(ppo, sft)
    counts = win_tie_lose(ppo, sft)
    total = counts.win + counts.tie + counts.lose
    return {
        "name": scorer.name,
        "role": scorer.role,
        "sft_mean": sum(sft) / total,
        "ppo_mean": sum(ppo) / total,
        "difference": difference.mean,
        "ci95": list(difference.interval) if difference.interval else None,
        "win": counts.win,
        "tie": counts.tie,
        "lose": counts.lose,
        "win_rate": counts.win_rate,
        "win_ci95": list(wilson_interval(counts.win + counts.tie / 2, total)),
    }


def prompt_means(scores: list[float], each: int) -> list[float]:
    """One number for each prompt: the mean over its `each` replies, which stand together."""
    return [statistics.fmean(scores[i : i + each]) for i in range(0, len(scores), each)]


def describe(answers: Answers) -> dict[str, float]:
    """Perplexity, length, truncation and repetition of one model's replies."""
    found = response_metrics(answers.rollout.responses, answers.rollout.finished)
    return {"perplexity": answers.perplexity} | {
        key.removeprefix("response/"): v for key, v in found.items()
    }


def by_group(rows: list[PromptRow], scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The first scorer's difference by language and kind, where the prompts say."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        name = "/".join(str(row.meta[key]) for key in ("lang", "kind") if key in row.meta)
        if name and scores["sft"]:
            groups.setdefault(name, []).append(index)
    result = []
    for name, indices in sorted(groups.items()):
        found = paired_difference(
            [scores["ppo"][i] for i in indices], [scores["sft"][i] for i in indices]
        )
        interval = list(found.interval) if found.interval else None
        result.append(
            {"group": name, "n": len(indices), "difference": found.mean, "ci95": interval}
        )
    return result


def samples(
    rows: list[PromptRow],
    sft: Answers,
    ppo: Answers,
    scores: dict[str, list[float]],
    config: EvalConfig,
) -> list[dict[str, Any]]:
    """The first prompts with the first reply of both models."""
    result = []
    for nth, row in enumerate(rows[: config.samples]):
        index = nth * config.samples_per_prompt
        record: dict[str, Any] = {
            "id": row.id,
            "prompt": list(row.messages),
            "sft": sft.texts[index],
            "ppo": ppo.texts[index],
        }
        if scores["sft"]:
            record |= {"sft_score": scores["sft"][index], "ppo_score": scores["ppo"][index]}
        result.append(record)
    return result
