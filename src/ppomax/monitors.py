"""Every metric, declared once: unit, condition, meaning, source, what a bad value looks like.

`docs/metrics.md` is made from these declarations; logging an undeclared key is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One declared key."""

    key: str
    unit: str
    meaning: str
    bad: str = ""
    """What a bad value looks like."""
    condition: str = ""
    """Where it is logged; empty: in every row of its stages."""
    stages: tuple[str, ...] = ("ppo", "critic")
    family: bool = False
    """Also logged as `key_VALUE`, for values found in the data."""
    source: str = ""
    """Where the measure comes from, of Zheng et al. 2023 where no author is named; empty: ours."""


_UPDATE = ("ppo",)
_SUPERVISED = ("sft", "reward")
_ALL = ("ppo", "critic", *_SUPERVISED)
_REFERENCE = "with a reference model (kl not null)"
_CRITIC = "with a critic (advantage.estimator: gae)"
_PLAIN = "with plain temperature sampling"
_HELDOUT = "in iterations that answer the held-out prompts"

DECLARED: tuple[Metric, ...] = (
    Metric(
        "reward/score_mean",
        "score",
        "Mean raw score of the replies",
        "rises while KL and length rise: reward hacking",
        source="§5.2, Fig. 4",
    ),
    Metric(
        "reward/score_std",
        "score",
        "Unbiased standard deviation of raw scores",
        "near 0: the reward no longer tells replies apart",
        source="§5.2",
    ),
    Metric(
        "reward/score_skew",
        "1",
        "Skewness of raw scores (g1: the population's moments)",
        "a long tail growing: pattern collapse",
        source="Fig. 13",
    ),
    *(
        Metric(
            f"reward/score_p{q:02d}", "score", f"{q}th percentile of raw scores", source="Fig. 13"
        )
        for q in (5, 25, 50, 75, 95)
    ),
    Metric(
        "reward/ensemble_std",
        "score",
        "Std of the members' standardized scores of a reply (÷ their number), mean over replies",
        "rises: the policy goes where the reward models disagree",
        "with several reward models in ensemble (ppo.reward.ensemble, or a folder of members)",
        source="Coste et al. 2023 (2310.02743)",
    ),
    Metric(
        "reward/score_kurtosis",
        "1",
        "Excess kurtosis of raw scores (g2: the population's moments)",
        "rising: a long tail, or two kinds of replies",
        source="Fig. 13",
    ),
    Metric(
        "reward/score_w1",
        "score",
        "Wasserstein-1 distance of the scores to those of the unchanged policy's replies",
        "a steep rise",
        source="Fig. 13",
    ),
    Metric(
        "reward/length_correlation",
        "1",
        "Pearson correlation of score and reply length within the rollout",
        "near 1: length is being paid for",
        source="Singhal et al. 2023 (2310.03716)",
    ),
    Metric(
        "reward/sqrt_kl_residual",
        "score",
        "Mean score less what a line over √KL (nats per response) through the earlier rows gives",
        "falling: KL is spent for less and less score",
        "with a reference model, from the 11th row on, once KL has varied",
        source="Gao et al. 2022 (2210.10760)",
    ),
    Metric(
        "reward/total_mean",
        "reward",
        "Mean over replies of the summed token rewards: reparameterized score, KL penalty included",
        source="eq. 19",
    ),
    Metric(
        "kl/ref_k1",
        "nats/token",
        "Mean of log π − log π_ref over response tokens (k1)",
        "clearly negative: the sampler is not the policy",
        _REFERENCE,
        source="eq. 19",
    ),
    Metric(
        "kl/ref_k1_se",
        "nats/token",
        "Standard error of kl/ref_k1, clustered by response",
        "",
        _REFERENCE,
        source="Cochran 1977, §6.3",
    ),
    Metric(
        "kl/ref_k3",
        "nats/token",
        "Mean of e^r − 1 − r, r = log π_ref − log π (k3, never negative)",
        "a steep rise: drift from the SFT model",
        _REFERENCE,
        source="§5.2; Schulman 2020",
    ),
    Metric(
        "kl/ref_sequence",
        "nats/response",
        "k1 summed over a response, mean over responses",
        "",
        _REFERENCE,
        source="eq. 19",
    ),
    Metric(
        "kl/coef",
        "1",
        "Coefficient of the KL penalty in this iteration",
        "",
        _REFERENCE,
        source="eq. 19",
    ),
    Metric(
        "kl/ref_exact",
        "nats/token",
        "KL(π‖π_ref) over the whole vocabulary, the first kl.exact_replies replies",
        "far from kl/ref_k1: an estimator or the sampler is off",
        "with kl.exact_replies",
    ),
    Metric(
        "kl/loss",
        "nats/token",
        "The KL term of the loss, by kl.estimator, before its coefficient",
        "",
        "with kl.where: loss",
        _UPDATE,
    ),
    Metric(
        "kl/old_k3",
        "nats/token",
        "KL from the sampling policy during the update (k3)",
        "above 0.05: steps too large",
        "",
        _UPDATE,
        source="§5.2; Schulman 2020",
    ),
    Metric(
        "kl/first_old_k3",
        "nats/token",
        "The same in the first optimizer step; 0 bitwise",
        "not 0: scoring and training differ",
        "",
        _UPDATE,
        source="Schulman 2020",
    ),
    Metric(
        "policy/first_ratio_error",
        "1",
        "Largest |ratio − 1| in the first optimizer step; 0 bitwise. In one process nine "
        "iterations of ten keep one micro-batch's forward, which this does not check",
        "not 0: scoring and training differ",
        "",
        _UPDATE,
    ),
    Metric(
        "policy/perplexity",
        "1",
        "exp(mean NLL) of the policy's own response tokens, temperature 1",
        "falls towards 1: pattern collapse",
        source="§5.2, Fig. 4",
    ),
    Metric(
        "ref/perplexity",
        "1",
        "The same responses under the reference",
        "rises: replies the SFT model finds odd",
        _REFERENCE,
    ),
    Metric(
        "policy/entropy",
        "nats/token",
        "Mean entropy of the next-token distribution at the sampling temperature",
        "near 0 or exploding",
        source="§5.2",
    ),
    Metric("policy/loss", "1", "Surrogate objective, negated", "", "", _UPDATE, source="eq. 15"),
    Metric(
        "policy/penalty_coef",
        "1",
        "β of PPO-penalty in this iteration",
        "doubles without end: steps too large",
        "with loss.penalty_coef",
        _UPDATE,
        source="eq. 14",
    ),
    Metric(
        "policy/clip_fraction",
        "share",
        "Response tokens whose gradient the clip removed",
        "near 1",
        "",
        _UPDATE,
        source="§5.2",
    ),
    Metric(
        "policy/ratio_mean", "1", "Mean ratio π/π_old", "far from 1", "", _UPDATE, source="§5.2"
    ),
    Metric("policy/ratio_max", "1", "Largest ratio", "above 10", "", _UPDATE),
    Metric(
        "policy/grad_norm",
        "1",
        "Global gradient norm before the clip",
        "spikes",
        "absent when every step was skipped",
        _UPDATE,
        source="detail 12",
    ),
    Metric("policy/lr", "1", "Learning rate", "", "", _UPDATE, source="§5.1"),
    Metric(
        "value/loss",
        "reward²",
        "½ squared error to the returns, clipped form",
        "does not fall in pre-training",
        _CRITIC,
        source="eq. 16, detail 7",
    ),
    Metric(
        "value/clip_fraction",
        "share",
        "Response tokens where the value clip was active",
        "near 1",
        "with loss.value_clip, outside critic pre-training",
        _UPDATE,
        source="§5.2, detail 7",
    ),
    Metric(
        "value/mean",
        "reward",
        "Mean value of states before response tokens",
        "",
        _CRITIC,
        source="§5.2",
    ),
    Metric(
        "value/explained_variance",
        "1",
        "1 − Var(G − V)/Var(G), G the λ = 1 returns (no critic in them: with "
        "advantage.missing_eos: bootstrap those of finished replies), before the update",
        "below 0: the critic is worse than a constant",
        _CRITIC,
    ),
    Metric(
        "value/grad_norm",
        "1",
        "The critic's gradient norm before the clip",
        "spikes",
        "with a critic; absent when every step was skipped",
        source="detail 12",
    ),
    Metric("value/lr", "1", "The critic's learning rate", "", _CRITIC, source="§5.1"),
    Metric(
        "return/mean", "reward", "Mean of the critic's targets", "", _CRITIC, source="§5.2, eq. 9"
    ),
    Metric("advantage/mean", "reward", "Mean advantage over response tokens", source="§5.2, eq. 9"),
    Metric(
        "advantage/std", "reward", "Unbiased standard deviation of advantages", source="§5.2, eq. 9"
    ),
    Metric(
        "response/length_mean",
        "tokens",
        "Mean reply length, end token included",
        "pinned at the limit, or towards 0",
        source="§5.2, Fig. 4",
    ),
    Metric("response/length_p95", "tokens", "95th percentile of reply length"),
    Metric(
        "response/truncated_share",
        "share",
        "Replies cut at the limit without an end token",
        "rising",
    ),
    Metric(
        "response/distinct_2",
        "share",
        "Different bigrams over all bigrams within a reply, mean",
        "falling",
        source="Li et al. 2016 (1510.03055)",
    ),
    Metric(
        "response/repetition_4",
        "share",
        "4-grams that repeat within a reply, mean",
        "rising",
        source="Welleck et al. 2019 (1908.04319)",
    ),
    Metric(
        "response/top_opening_share",
        "share",
        "Replies that begin with the most frequent first four tokens",
        "rising: one way to begin is left",
    ),
    Metric(
        "ptx/loss",
        "nats/token",
        "NLL of the plain text",
        "rising: the alignment tax",
        "with ppo.ptx",
        _UPDATE,
        source="eq. 17",
    ),
    Metric(
        "engine/logprob_gap_mean",
        "nats/token",
        "Mean |engine's − trainer's| log-prob of response tokens",
        "above 0.05",
        _PLAIN,
    ),
    Metric("engine/logprob_gap_max", "nats/token", "The largest such gap", "above 1", _PLAIN),
    *(
        Metric(key, unit, meaning, bad, _HELDOUT, _UPDATE, source="Fig. 13")
        for key, unit, meaning, bad in (
            ("heldout/score_mean", "score", "Mean score of replies to the held-out prompts", ""),
            ("heldout/score_p05", "score", "Their 5th percentile", ""),
            ("heldout/score_p50", "score", "Their median", ""),
            ("heldout/score_p95", "score", "Their 95th percentile", ""),
            (
                "heldout/score_w1",
                "score",
                "Wasserstein-1 distance to the scores of the SFT model's replies",
                "a jump",
            ),
        )
    ),
    *(
        Metric(key, unit, meaning, bad, _HELDOUT, _UPDATE)
        for key, unit, meaning, bad in (
            ("heldout/length_mean", "tokens", "Mean length of these replies", ""),
            ("heldout/perplexity", "1", "The policy's perplexity of them", "falls towards 1"),
            ("time/heldout", "s", "Seconds to answer and score them", ""),
        )
    ),
    *(
        Metric(key, unit, meaning, bad, "the same, with a second scorer", _UPDATE, source="§6")
        for key, unit, meaning, bad in (
            (
                "heldout/second_mean",
                "score",
                "Mean score by a scorer that PPO never sees",
                "falls while the proxy rises: over-optimised",
            ),
            ("heldout/win", "share", "Replies it scores above the SFT model's", ""),
            ("heldout/tie", "share", "Replies it scores the same", ""),
            ("heldout/lose", "share", "Replies it scores below the SFT model's", "above win"),
        )
    ),
    Metric("time/rollout", "s", "Seconds to write the replies"),
    Metric("time/score", "s", "Seconds for the four roles' forwards"),
    Metric("time/update", "s", "Seconds for the optimizer steps and the engine's sync"),
    Metric("throughput/rollout_tokens_per_s", "tokens/s", "Response tokens written per second"),
    Metric(
        "throughput/train_tokens_per_s",
        "tokens/s",
        "Tokens trained on per second: prompts and responses; sft and reward: batch/tokens",
        stages=_ALL,
    ),
    Metric("time/step", "s", "Seconds for the optimizer step", stages=_SUPERVISED),
    Metric(
        "memory/peak_gb",
        "GB",
        "Largest memory so far (10⁹ bytes): device memory on CUDA, resident memory elsewhere",
        stages=_ALL,
    ),
    Metric(
        "reward/loss",
        "1",
        "Ranking plus imitation loss (eq. 2)",
        "",
        "",
        ("reward",),
        source="eq. 2",
    ),
    Metric(
        "reward/pair_loss",
        "nats/pair",
        "−log σ(score difference), mean over pairs",
        "above ln 2 = 0.69",
        "",
        ("reward",),
        source="eq. 2",
    ),
    Metric(
        "reward/lm_loss",
        "nats/token",
        "Imitation NLL of preferred answers",
        "",
        "with lm_coef above 0",
        ("reward",),
        source="eq. 2",
    ),
    Metric(
        "reward/centre_loss",
        "score²",
        "Squared sum of a pair's scores, mean over pairs",
        "",
        "with centre_coef",
        ("reward",),
        source="Eisenstein et al. 2023 (2312.09244)",
    ),
    Metric(
        "reward/accuracy",
        "share",
        "Pairs of the step ranked as the annotator did",
        "0.5: chance",
        "",
        ("reward",),
        source="Fig. 3",
    ),
    Metric(
        "reward/grad_norm",
        "1",
        "Global gradient norm before the clip",
        "spikes",
        "",
        ("reward",),
        source="detail 12",
    ),
    Metric("reward/lr", "1", "Learning rate", "", "", ("reward",), source="§4"),
    Metric("batch/pairs", "pairs", "Pairs in the step", "", "", ("reward",)),
    Metric(
        "batch/tokens",
        "tokens",
        "Tokens in the step (sft: target tokens)",
        "",
        "",
        ("reward", "sft"),
    ),
    Metric(
        "eval/accuracy",
        "share",
        "Held-out pairs ranked as the annotator did",
        "0.5: chance",
        "every eval_every steps, with held-out rows",
        ("reward",),
        source="Fig. 3",
    ),
    Metric(
        "eval/loss",
        "nats",
        "Held-out loss: per pair (reward), per assistant token (sft)",
        "rising: over-fitting",
        "every eval_every steps, with held-out rows",
        ("reward", "sft"),
    ),
    Metric(
        "ensemble/score_std",
        "score",
        "Standard deviation of a held-out answer's score over the members, mean over answers",
        "large beside the spread of scores: the members have learned different things",
        "with ensemble, in the last row; other keys are then means over the members",
        ("reward",),
    ),
    Metric(
        "ensemble/accuracy",
        "share",
        "Held-out pairs that the members' mean score ranks as the annotator did",
        "0.5: chance",
        "with ensemble, in the last row",
        ("reward",),
    ),
    Metric(
        "ensemble/loss",
        "nats/pair",
        "Held-out loss of the members' mean score",
        "above ln 2 = 0.69",
        "with ensemble, in the last row",
        ("reward",),
    ),
    Metric(
        "eval/perplexity",
        "1",
        "exp of the held-out loss; also as `eval/perplexity_VALUE` for each value of `eval_by`",
        "rising: over-fitting",
        "every eval_every steps, with held-out rows",
        ("sft",),
        family=True,
    ),
    Metric("sft/loss", "nats/token", "NLL of assistant tokens", "", "", ("sft",), source="§5.1"),
    Metric("sft/perplexity", "1", "exp of it", "", "", ("sft",)),
    Metric(
        "sft/grad_norm",
        "1",
        "Global gradient norm before the clip",
        "spikes",
        "",
        ("sft",),
        source="detail 12",
    ),
    Metric("sft/lr", "1", "Learning rate", "", "", ("sft",), source="§5.1"),
)


def check_keys(stage: str, values: Mapping[str, float]) -> None:
    """Refuse a key that is not declared for the stage.

    Raises:
        KeyError: a programming mistake, not a user's.
    """
    own = [metric for metric in DECLARED if stage in metric.stages]
    known = {metric.key for metric in own}
    families = tuple(f"{metric.key}_" for metric in own if metric.family)
    unknown = sorted(key for key in set(values) - known if not key.startswith(families))
    if unknown:
        raise KeyError(f"metric keys not declared for stage {stage}: {', '.join(unknown)}")


def as_markdown() -> str:
    """The declarations as the text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Made by `make docs` from `src/ppomax/monitors.py`; what is not here cannot be logged.",
        "Where a condition does not hold the key is absent, never 0 or NaN. Sections, figures,",
        "equations and details are of Zheng et al. 2023 (2307.04964); where no source stands, the",
        "measure is ours or plain book-keeping.",
        "",
        "| key | stages | unit | meaning | source | bad when | condition |",
        "|---|---|---|---|---|---|---|",
    ]
    for metric in DECLARED:
        cells = [
            f"`{metric.key}`",
            ", ".join(metric.stages),
            metric.unit,
            metric.meaning,
            metric.source,
            metric.bad,
            metric.condition,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
