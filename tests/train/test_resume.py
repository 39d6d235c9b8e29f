"""A run killed or stopped anywhere and resumed is the run that was left alone, bit for bit.

Pitfalls 33 (epoch edges) and 34 (everything that is state is saved). Each run is a process of its
own that a trap kills at a chosen call; see tests/job.py.
"""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

TIMES = ("time", "throughput/", "memory/")
SMOKE = Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml"
FEW = "data={path: bundled:preferences, limit: 80}"
SFT = ["sft.batch_tokens=1024", f"sft.{FEW}"]
BUSY = [
    *SFT,
    "ppo.critic_pretraining.explained_variance=1.0",
    "ppo.critic_pretraining.max_rollouts=3",
    "ppo.kl.target_per_token=0.001",
    "ppo.kl.horizon=20",
    "ppo.epochs=2",
    "ppo.critic_optim.schedule=linear",
    "eval.limit=8",
    "reward.batch_tokens=1024",
    f"reward.{FEW}",
    f"ppo.{FEW}",
    "ppo.rollout_size=8",
    "ppo.minibatch_size=4",
]
"""The smoke recipe, a quarter of its size, with everything in it that has state: controller,
schedules, critic rollouts."""

UNASKED = ("checkpoint", "damaged_checkpoint")
"""Events that only a disturbed run has: a save where a signal asked for it, damage that was met."""

ONLY_SFT = ["reward=null", "ppo=null", "eval=null"]
LOGGED = ["ppomax.rundir", "append_jsonl"]
KILL, TERM = int(signal.SIGKILL), int(signal.SIGTERM)
POINTS = {
    "in the middle of sft": [*LOGGED, "'stage': 'sft', 'step': 3", 1],
    "between weights and tokenizer of an export": ["ppomax.models.export", "_write_merged", "", 1],
    "as the reward stage starts": ["ppomax.rundir", "create", "reward", 1],
    "in the middle of reward": [*LOGGED, "'stage': 'reward', 'step': 5", 1],
    "before the first checkpoint of ppo": [*LOGGED, "'stage': 'critic', 'step': 1", 1],
    "in the middle of critic pre-training": [*LOGGED, "'stage': 'critic', 'step': 3", 1],
    "in the middle of ppo": [*LOGGED, "'stage': 'ppo', 'step': 2", 1],
    "while a checkpoint is written": ["ppomax.checkpoint", "_sync", "step-000006", 4],
    "when ppo is trained and not yet exported": ["ppomax.train.ppo_export", "state_on_main", "", 1],
    "during evaluation": ["ppomax.eval.policy", "score_replies", "", 1],
    "before the report": ["ppomax.rundir", "write_text", "eval/done.json", 1],
}

PHASES = {
    "a step of sft": ["ppomax.train.supervised", "peak_memory_gb", "", 2],
    "an export": POINTS["between weights and tokenizer of an export"],
    "the reward stage's start": POINTS["as the reward stage starts"],
    "a step of reward": ["ppomax.train.reward", "step_losses", "", 3],
    "a rollout for the critic": ["ppomax.train.ppo", "reply_seeds", "critic", 2],
    "an update of the critic": ["ppomax.train.ppo", "update_critic", "", 3],
    "scoring": ["ppomax.train.experience_batch", "reply_batch", "", 3],
    "an update": ["ppomax.train.update", "clipped_policy_loss", "", 5],
    "a rollout": ["ppomax.rollout.native", "settle", "", 12],
    "a checkpoint": ["ppomax.checkpoint", "_sync", "step-", 3],
    "evaluation": POINTS["during evaluation"],
}
"""A call in each phase."""


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(path):
    """A stage's files without the clock."""
    found = {}
    for name in ("metrics", "samples", "events"):
        if (path / f"{name}.jsonl").exists():
            found[name] = [
                {k: v for k, v in row.items() if not k.startswith(TIMES)}
                for row in jsonl(path / f"{name}.jsonl")
                if row.get("kind") not in UNASKED
            ]
    return found


def assert_same_run(one, other, stages=("sft", "reward", "ppo")):
    for stage in stages:
        assert told(one / stage) == told(other / stage), stage
        assert (one / stage / "done.json").exists()
        left = [(run / stage / "export" / "model.safetensors") for run in (one, other)]
        assert left[0].read_bytes() == left[1].read_bytes(), stage
    if (one / "eval").exists():
        reports = [json.loads((run / "eval" / "report.json").read_text()) for run in (one, other)]
        assert reports[0] == reports[1]
        assert (one / "report.html").exists()


def run(launch, out, *words, die=None, ranks=1):
    busy = SFT if words[:3] == tuple(ONLY_SFT) else BUSY
    argv = ["run", str(SMOKE), "out=run", *busy, *words]
    return launch(ranks=ranks, argv=argv, cwd=str(out), die=die)


@pytest.fixture(scope="module")
def undisturbed(launch, tmp_path_factory):
    """The runs nobody touched, by their words and ranks."""
    made = {}

    def get(*words, ranks=1):
        key = (words, ranks)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed")
            ended = run(launch, made[key], *words, ranks=ranks)
            assert {end.code for end in ended} == {0}, ended[0].log
        return made[key] / "run"

    return get


def interrupted(launch, out, points, number, *words):
    """Start a run and go on with it, each time until the next trap; returns how each try ended."""
    found = []
    for index, point in enumerate(points):
        die = [*POINTS[point], number]
        if index:
            found += launch(argv=["resume", "run"], cwd=str(out), die=die)
        else:
            found += run(launch, out, *words, die=die)
        assert not (out / "run" / "report.html").exists(), point
    found += launch(argv=["resume", "run"], cwd=str(out))
    return found


@pytest.mark.slow
def test_34_killed_again_and_again_and_resumed_is_bitwise_undisturbed(
    launch, tmp_path, undisturbed
):
    ended = interrupted(launch, tmp_path, list(POINTS), KILL)
    for point, end in zip(POINTS, ended, strict=False):
        assert end.code == -KILL, (point, end.log)
    assert ended[-1].code == 0, ended[-1].log
    assert_same_run(tmp_path / "run", undisturbed())
    assert not [p for p in (tmp_path / "run").rglob("*") if "part" in p.name.split(".")[-1]]


@pytest.mark.slow
def test_34_in_bf16_too(launch, tmp_path, undisturbed):
    points = ["in the middle of reward", "in the middle of ppo"]
    few = "{path: bundled:preferences, limit: 24}"  # minutes where bf16 products are emulated
    words = [f"sft.data={few}", f"reward.data={few}", "sft.max_steps=3"]
    words += ["dtype=bfloat16", "ppo.iterations=2", "eval=null"]
    ended = interrupted(launch, tmp_path, points, KILL, *words)
    assert [end.code for end in ended] == [-KILL, -KILL, 0]
    assert_same_run(tmp_path / "run", undisturbed(*words))


@pytest.mark.slow
def test_a_signal_in_any_phase_saves_the_state_and_exits_75_at_once(launch, tmp_path, undisturbed):
    signals = (TERM, int(signal.SIGINT), int(signal.SIGUSR1))
    dies = [[*point, signals[i % 3]] for i, point in enumerate(PHASES.values())]
    for index, (name, die) in enumerate(zip(PHASES, dies, strict=True)):
        if index:
            (end,) = launch(argv=["resume", "run"], cwd=str(tmp_path), die=die)
        else:
            (end,) = run(launch, tmp_path, die=die)
        assert end.code == 75, (name, end.log)
        last = end.log.strip().splitlines()[-1]
        assert last.startswith("ppomax: stopped at a signal"), name
        assert "ppomax resume" in last
        (sent,) = [line for line in end.log.splitlines() if line.startswith("signalled")]
        assert time.time() - float(sent.split()[1]) < 30, name
    (end,) = launch(argv=["resume", "run"], cwd=str(tmp_path))
    assert end.code == 0, end.log
    assert_same_run(tmp_path / "run", undisturbed())


@pytest.mark.slow
def test_a_signal_stops_the_step_it_meets_not_the_next_checkpoint(launch, tmp_path):
    die = [*LOGGED, "'stage': 'sft', 'step': 3", 1, TERM]  # checkpoints are due at 2, 4, 6
    assert run(launch, tmp_path, *ONLY_SFT, die=die)[0].code == 75
    newest = max((tmp_path / "run" / "sft" / "checkpoints").iterdir())
    assert newest.name == "step-000003"
    assert len(jsonl(tmp_path / "run" / "sft" / "metrics.jsonl")) == 3


@pytest.mark.slow
def test_rows_past_the_checkpoint_are_cut_back_and_a_torn_line_with_them(launch, tmp_path):
    die = [*LOGGED, "'stage': 'sft', 'step': 5", 1, KILL]
    assert run(launch, tmp_path, *ONLY_SFT, die=die)[0].code == -KILL
    path = tmp_path / "run" / "sft" / "metrics.jsonl"
    assert [row["step"] for row in jsonl(path)] == [1, 2, 3, 4, 5]
    with path.open("a") as file:
        file.write('{"stage": "sft", "st')
    assert launch(argv=["resume", "run"], cwd=str(tmp_path))[0].code == 0
    assert [row["step"] for row in jsonl(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(launch, tmp_path, undisturbed):
    die = [*LOGGED, "'stage': 'sft', 'step': 5", 1, KILL]
    assert run(launch, tmp_path, *ONLY_SFT, die=die)[0].code == -KILL
    newest = max((tmp_path / "run" / "sft" / "checkpoints").iterdir())
    assert newest.name == "step-000004"
    weights = newest / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert launch(argv=["resume", "run"], cwd=str(tmp_path))[0].code == 0
    assert_same_run(tmp_path / "run", undisturbed(), stages=["sft"])


@pytest.mark.slow
def test_other_settings_cannot_be_resumed(launch, tmp_path):
    die = [*LOGGED, "'stage': 'reward', 'step': 3", 1, KILL]
    assert run(launch, tmp_path, die=die)[0].code == -KILL
    recipe = tmp_path / "run" / "config.yaml"
    original = recipe.read_text()
    before = told(tmp_path / "run" / "reward")
    for old, new in (("batch_tokens: 1024", "batch_tokens: 2048"), ("lr: 0.001", "lr: 0.002")):
        assert old in original
        recipe.write_text(original.replace(old, new))
        ended = launch(argv=["resume", "run"], cwd=str(tmp_path))[0]
        assert ended.code == 2, ended.log
        last = ended.log.strip().splitlines()[-1]
        assert "other settings" in last or "config.yaml differs" in last
    recipe.write_text(original)
    own = tmp_path / "run" / "reward" / "config.yaml"
    own.write_text(own.read_text().replace("lm_coef: 1.0", "lm_coef: 0.5"))
    ended = launch(argv=["resume", "run"], cwd=str(tmp_path))[0]
    assert ended.code == 2
    assert "reward: holds a run with other settings" in ended.log
    assert told(tmp_path / "run" / "reward") == before


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_33_resuming_around_an_epoch_edge(step, launch, small, tmp_path):
    change = {"epochs": 2, "max_steps": None, "eval_every": 1, "checkpoint": {"every": 1}}
    names = {"a": None, "b": [*LOGGED, f"'stage': 'sft', 'step': {step}", 1, KILL]}
    for name, die in names.items():
        settings = small("sft", Path(name), change).model_dump(mode="json")
        ended = launch(stages=[("sft", settings, False)], cwd=str(tmp_path), die=die)[0]
        assert ended.code == (-KILL if die else 0), ended.log
    (tmp_path / "a").rename(tmp_path / "alone")
    again = launch(stages=[("sft", settings, True)], cwd=str(tmp_path))[0]
    assert again.code == 0, again.log
    found = told(tmp_path / "alone")
    assert len(found["metrics"]) == 6, "three steps an epoch: the edge lies behind step 3"
    assert told(tmp_path / "b") == found
    left = [(tmp_path / n / "export" / "model.safetensors") for n in ("alone", "b")]
    assert left[0].read_bytes() == left[1].read_bytes()


@pytest.mark.slow
def test_34_lora_and_untouched_base_come_back_too(launch, small, tmp_path):
    change = {"lora": {"rank": 2}, "iterations": 3, "checkpoint": {"every": 1}, "epochs": 2}
    change |= {"ptx": {"data": "bundled:text", "tokens": 20}}
    settings = [small("ppo", Path(n), change).model_dump(mode="json") for n in ("a", "b")]
    assert launch(stages=[("ppo", settings[0], False)], cwd=str(tmp_path))[0].code == 0
    die = [*LOGGED, "'stage': 'ppo', 'step': 2", 1, KILL]
    assert launch(stages=[("ppo", settings[1], False)], cwd=str(tmp_path), die=die)[0].code == -KILL
    assert launch(stages=[("ppo", settings[1], True)], cwd=str(tmp_path))[0].code == 0
    assert told(tmp_path / "a") == told(tmp_path / "b")
    left = [(tmp_path / n / "export" / "model.safetensors") for n in ("a", "b")]
    assert left[0].read_bytes() == left[1].read_bytes()


@pytest.mark.slow
def test_two_ranks_stop_together_and_go_on_where_they_stood(launch, tmp_path, undisturbed):
    # only rank 0 writes, so the signal reaches it alone; the other must stop with it
    sft, ppo = (
        [*LOGGED, f"'stage': {at}", 1, TERM] for at in ("'sft', 'step': 3", "'ppo', 'step': 2")
    )
    again = {"ranks": 2, "argv": ["resume", "run"], "cwd": str(tmp_path)}
    for ended in (run(launch, tmp_path, die=sft, ranks=2), launch(**again, die=ppo)):
        assert [end.code for end in ended] == [75, 75], ended[1].log
    ended = launch(**again)
    assert [end.code for end in ended] == [0, 0], ended[0].log
    assert_same_run(tmp_path / "run", undisturbed(ranks=2))


@pytest.mark.slow
def test_a_rank_killed_in_a_save_and_one_in_a_step_are_restarted_to_the_undisturbed_end(
    tmp_path, tiny_cache, undisturbed
):
    """`torchrun --max-restarts` with `ppomax run --resume`: two processes' run bit for bit, and the
    run of one process in its numbers."""
    import os
    import subprocess

    program = str(Path(__file__).resolve().parents[1] / "dying.py")
    kills = [
        [0, "ppomax.checkpoint", "_sync", "step-000004", 3],
        [1, "ppomax.train.ppo", "update_critic", "", 7],
    ]
    env = os.environ | {"PPOMAX_CACHE": str(tiny_cache), "OMP_NUM_THREADS": "1"}
    env |= {"DIE": json.dumps(kills), "GLIBC_TUNABLES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=2", program, "run", str(SMOKE), "out=run", *BUSY, "--resume"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    died = [line for line in done.stdout.splitlines() if line.startswith("dying:")]
    assert len(died) == len(kills), done.stdout
    assert_same_run(tmp_path / "run", undisturbed(ranks=2))
    for stage in ("sft", "reward"):
        one, two = (told(out / stage)["metrics"] for out in (undisturbed(), tmp_path / "run"))
        assert len(one) == len(two)
        for row, other in zip(one, two, strict=True):
            numbers = {k: v for k, v in row.items() if k != "stage"}
            assert {k: other[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def test_two_tensors_of_a_checkpoint_are_not_one(small, tmp_path):
    """Tied weights are saved once; nothing is saved twice under two names."""
    from ppomax.train.sft import train_sft

    path = train_sft(small("sft", tmp_path / "run"))
    found = load_file(max((path / "checkpoints").iterdir()) / "policy.safetensors")
    assert "lm.model.embed_tokens.weight" in found
    assert "lm.lm_head.weight" not in found
