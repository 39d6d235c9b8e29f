"""What a test's own process does; `launch` in conftest.py runs it with `JOB` in its globals.

argv    words after `ppomax`, or
stages  [(sft | reward | ppo | eval, settings, resume)], run one after the other
cwd, path, env, log  where it runs, folders to import from, variables, file for its output
die     [module, attribute, text, count, signal]: after the count-th call of module.attribute
        whose arguments hold the text, the process sends itself the signal
gradients  folder for every optimizer step's gradients, before the clip, one file a step
"""

import faulthandler
import importlib
import os
import sys
import time
from pathlib import Path

JOB = globals()["JOB"]


def trap(module, attribute, text, count, signal):
    """Put a wrapper in the place of a function."""
    home = importlib.import_module(module)
    inner = getattr(home, attribute)
    seen = 0

    def wrapper(*args, **kwargs):
        nonlocal seen
        result = inner(*args, **kwargs)
        if text in repr((args, kwargs)):
            seen += 1
            if seen == count:
                sys.stdout.write(f"signalled {time.time()}\n")
                sys.stdout.flush()
                os.kill(os.getpid(), signal)
        return result

    setattr(home, attribute, wrapper)


def keep_gradients(folder):
    """Rank 0 writes what every call of `clip_gradients` was given, parameters by their place."""
    from safetensors.torch import save_file

    from ppomax import distributed

    plain = distributed.clip_gradients
    seen = 0

    def clip(parameters, max_norm):
        nonlocal seen
        whole = {str(i): distributed.full(p.grad).clone() for i, p in enumerate(parameters)}
        if os.environ.get("RANK", "0") == "0":
            Path(folder).mkdir(exist_ok=True)
            save_file(whole, Path(folder) / f"{seen:04}.safetensors")
        seen += 1
        return plain(parameters, max_norm)

    distributed.clip_gradients = clip


def run_stage(name, settings, resume):
    """One stage by its Python entry."""
    from ppomax.config import parse
    from ppomax.eval.policy import evaluate_policy
    from ppomax.eval.policy_config import EvalConfig
    from ppomax.train.ppo import train_ppo
    from ppomax.train.ppo_config import PPOConfig
    from ppomax.train.reward import RewardConfig, train_reward
    from ppomax.train.sft import SFTConfig, train_sft

    if name == "eval":
        evaluate_policy(parse(EvalConfig, settings))
        return
    kind, train = {
        "sft": (SFTConfig, train_sft),
        "reward": (RewardConfig, train_reward),
        "ppo": (PPOConfig, train_ppo),
    }[name]
    train(parse(kind, settings), resume=resume)


def main():
    """Do the job; errors end as on the command line."""
    descriptor = os.open(JOB["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.dump_traceback_later(380, file=descriptor)  # where it stands if it is killed then
    os.environ.update(JOB["env"])
    if "cwd" in JOB:
        os.chdir(JOB["cwd"])
    sys.path[:0] = JOB.get("path", [])
    if JOB.get("die"):
        trap(*JOB["die"])
    if "gradients" in JOB:
        keep_gradients(JOB["gradients"])
    if "argv" in JOB:
        from ppomax import cli

        sys.argv = ["ppomax", *JOB["argv"]]
        cli.main()
        return
    from ppomax.distributed import world
    from ppomax.errors import PpomaxError

    with world("cpu"):
        for name, settings, resume in JOB["stages"]:
            try:
                run_stage(name, settings, resume)
            except PpomaxError as error:
                print(f"ppomax: {error}", file=sys.stderr)
                sys.exit(error.exit_code)


main()
