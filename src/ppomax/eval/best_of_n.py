"""The best of n replies by one scorer, judged by another: what choosing harder is worth."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppomax.data.sources import SourceConfig, load_sft
from ppomax.errors import DataError
from ppomax.eval.comparison import best_of_n, best_of_n_kl
from ppomax.eval.statistics import Floats, paired_difference
from ppomax.types import Messages, PreferenceRow


@dataclass(frozen=True, slots=True)
class Candidates:
    """Replies, flat, each beside its prompt; replies of one prompt stand together."""

    prompts: list[Messages]
    replies: list[str]


def load_candidates(files: Sequence[str], rows: Sequence[PreferenceRow]) -> Candidates:
    """Replies of files (rows of prompt and answer, several to a prompt), or of preference pairs."""
    replies: dict[str, dict[str, None]] = {}
    prompts: dict[str, Messages] = {}
    found: list[tuple[Messages, str]] = []
    if files:
        loaded = load_sft([SourceConfig(path=path) for path in files], max_bad_rows=1.0)
        found = [(row.messages[:-1], row.messages[-1]["content"]) for row in loaded.rows]
    else:
        for row in rows:
            found += [(row.prompt, row.chosen), (row.prompt, row.rejected)]
    for prompt, reply in found:
        key = repr(prompt)
        prompts[key] = prompt
        replies.setdefault(key, {})[reply] = None
    flat = [(prompts[key], reply) for key, each in replies.items() for reply in each]
    return Candidates([prompt for prompt, _ in flat], [reply for _, reply in flat])


def best_of_n_curve(candidates: Candidates, proxy: Floats, gold: Floats) -> dict[str, Any]:
    """Mean gold and proxy score of the proxy's best of n, over prompts that have enough replies.

    n goes up to the commonest number of replies to a prompt, so that every point has the same
    prompts. Intervals are of the gain over n = 1, paired by prompt.

    Raises:
        DataError: no prompt has two replies.
    """
    each: dict[str, list[int]] = {}
    for place, prompt in enumerate(candidates.prompts):
        if np.isfinite(proxy[place]) and np.isfinite(gold[place]):
            each.setdefault(repr(prompt), []).append(place)
    sizes = Counter(len(places) for places in each.values() if len(places) > 1)
    if not sizes:
        raise DataError("option gold: no prompt has two replies to choose from; give --candidates")
    most = min(sizes, key=lambda size: (-sizes[size], -size))
    kept = [places for places in each.values() if len(places) >= most]
    points = sorted({most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})
    judged = {
        n: np.array([best_of_n(proxy[places], gold[places], n) for places in kept]) for n in points
    }
    chosen = {
        n: np.array([best_of_n(proxy[places], proxy[places], n) for places in kept]) for n in points
    }
    gains = {n: paired_difference(judged[n], judged[1]) for n in points}
    return {
        "num_prompts": len(kept),
        "n": points,
        "kl": [best_of_n_kl(n) for n in points],
        "gold": [float(judged[n].mean()) for n in points],
        "proxy": [float(chosen[n].mean()) for n in points],
        "gold_gain": [gains[n].mean for n in points],
        "gold_gain_ci95": [
            list(gains[n].interval or (gains[n].mean, gains[n].mean)) for n in points
        ],
    }
