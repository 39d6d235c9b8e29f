"""Signals that ask a run to stop, and the clock that runs from then on."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a run to stop with its state saved."""


class StopAsked(BaseException):
    """A signal came; what was being done is dropped, and the state is that before it.

    No `Exception`: like KeyboardInterrupt it is not to be caught by those who catch errors.
    """


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `handler` gets `SIGNALS`; the handlers before it are restored at the end."""
    try:
        before = {number: signal.signal(number, handler) for number in SIGNALS}
    except ValueError:  # not the main thread: signals are the caller's
        yield
        return
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stopper:
    """Whether a signal has come, and when; a second one ends the process on the spot."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.nothing_to_save = False
        """On: a signal ends the work where it meets it, for the disk holds all there is."""

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.asked_at is not None

    @property
    def waited(self) -> float:
        """Seconds since the signal; 0 without one."""
        return 0.0 if self.asked_at is None else time.monotonic() - self.asked_at

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note `SIGNALS` instead of dying."""

        def note(number: int, _frame: FrameType | None) -> None:
            if self.asked_at is not None:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.asked_at = time.monotonic()
            if self.nothing_to_save:
                raise StopAsked

        with handling(note):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends the work where it meets it: for work that touches no state.

        Raises:
            StopAsked: one came, inside or before.
        """
        self.nothing_to_save = True
        try:
            if self.asked:
                raise StopAsked
            yield
        finally:
            self.nothing_to_save = False
