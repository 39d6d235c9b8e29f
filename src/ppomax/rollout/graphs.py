"""Decoding steps as CUDA graphs: one launch instead of the thousand kernels of a step.

A step of a small batch is bound by launches, not by the device. Recorded steps have fixed shapes:
every slot computes, also a free one, and attention looks at a span of the cache that grows by
`SPAN` positions from one graph to the next. What lies beyond a reply's own position is masked; a
free slot writes to the cache's last position, which no reply reads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ppomax.rollout.sampling import Draft

SPAN = 128
"""Positions. Recording takes about two steps' time, attending to 64 too many a tenth of one."""

Found = Draft | Tensor
"""Next tokens as far as they are drawn in the step, or the logits alone."""
Step = Callable[[Tensor, int], Found]
"""Tokens, positions, seeds and reply steps, [4, slots], and how far to attend."""


class StepGraphs:
    """Steps of one cache, recorded when their span is first met and replayed from then on."""

    def __init__(self, step: Step, slots: int, length: int, device: torch.device) -> None:
        self.step, self.length = step, length
        self.given = torch.zeros(4, slots, dtype=torch.long, device=device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Found]] = {}
        self.logits: Tensor | None = None
        """Where every graph leaves them: one that kept its own would hold [slots, vocab] each."""

    def __call__(self, given: Tensor, needed: int) -> Found:
        """What the step finds for slots 0..n-1, valid until the next call.

        Args:
            given: [4, n].
            needed: positions of the cache that must be attended to.
        """
        count, span = given.shape[1], span_of(needed, self.length)
        self.given[:, :count] = given
        self.given[:, count:] = 0
        self.given[1, count:] = self.length - 1
        if span not in self.graphs:
            self.graphs[span] = self._record(span)
        graph, found = self.graphs[span]
        graph.replay()
        return first_rows(found, count)

    def _record(self, span: int) -> tuple[torch.cuda.CUDAGraph, Found]:
        """The step, run once (it writes what the replay writes again), then recorded."""
        if self.logits is None:
            self.logits = torch.empty_like(logits_of(self.step(self.given, span)))
        else:
            self.step(self.given, span)
        shared = next(iter(self.graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=shared[0].pool() if shared else None,
            capture_error_mode="thread_local",  # checkpoints are written by another thread
        ):
            found = self._kept(self.step(self.given, span))
        return graph, found

    def _kept(self, found: Found) -> Found:
        """The same with the logits copied to their one place."""
        assert self.logits is not None
        self.logits.copy_(logits_of(found))
        return self.logits if isinstance(found, Tensor) else found._replace(logits=self.logits)


def logits_of(found: Found) -> Tensor:
    """[slots, vocab]."""
    return found if isinstance(found, Tensor) else found.logits


def span_of(needed: int, length: int) -> int:
    """Positions of the cache that a step attends to, of which it needs so many."""
    return min(-(-needed // SPAN) * SPAN, length)


def first_rows(found: Found, count: int) -> Found:
    """Views of what belongs to slots 0..count-1."""
    if isinstance(found, Tensor):
        return found[:count]
    draw = type(found.draw)(*(each[:count] for each in found.draw))
    rest = {
        name: each[:count] for name, each in found._asdict().items() if isinstance(each, Tensor)
    }
    return found._replace(draw=draw, **rest)
