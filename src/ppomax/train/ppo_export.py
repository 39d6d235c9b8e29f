"""The policy that PPO hands on: which one, and its folder."""

from ppomax.distributed import state_on_main
from ppomax.models.export import Card, export_policy
from ppomax.train.ppo_state import PPOState
from ppomax.train.recovery import read


def export(ppo: PPOState) -> None:
    """Write the policy as a Hugging Face folder: the one the monitors vouch for."""
    take_best(ppo)
    state = state_on_main(ppo.policy.lm, ppo.here)  # collective
    if ppo.here.is_main:
        card = Card(
            title="PPO-aligned policy",
            summary="Trained with ppomax by PPO from a reward model (Zheng et al. 2023, PPO-max).",
            source_model=ppo.config.model,
            datasets=[source.path for source in ppo.config.data],
        )
        export_policy(
            ppo.policy.lm,
            ppo.actors.template.tokenizer,
            ppo.run.path / "export",
            card=card,
            generation={"temperature": ppo.config.sampling.temperature},
            state=state,
            system=ppo.config.system,
        )


def take_best(ppo: PPOState) -> None:
    """Put the policy that is to be exported in place, where it is not the present one.

    The best by a second scorer among the green checkpoints kept; without one the present policy
    where the level is green, else the last green checkpoint (`action: log` only says so); never by
    the score that PPO was trained on, which is what an over-optimised policy is best at.
    """
    watch, monitor = ppo.watch, ppo.config.monitor
    if watch is None or monitor is None or (watch.well and not watch.seconds):
        return
    number = watch.exported()
    if number == ppo.number:
        return
    untrained = number is not None and number <= ppo.critic_rollouts
    if number is None or (monitor.action == "log" and not watch.seconds):
        note = f"the run did not end green; checkpoint {number} was the last that was"
        if number is None or untrained:
            note = "no green checkpoint of a trained policy was kept; the last state is exported"
        ppo.run.event("alarm_export", step=ppo.iteration, note=note)
        return
    why = "best by the second scorer" if watch.seconds else "last green one"
    if untrained:
        why += "; it is still the policy PPO began with"
    ppo.actors.policy.restore(read(ppo, number))
    ppo.run.event("export", step=ppo.iteration, checkpoint=number, why=why)
