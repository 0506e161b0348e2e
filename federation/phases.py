"""How long this rank spends on each phase of a round, as the wall's clock of its host tells."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")
# encode holds the server's broadcast, too; step what adds updates up; evaluate what describes a
# message for rounds.jsonl.
PHASES = ("train", "select", "encode", "exchange", "decode", "step", "evaluate")
# Of the phase that a thread is in: whose it is (phases), how long phases within it took (inner).
_this_thread = threading.local()


class Phases:
    """Seconds by phase, of all threads of this rank, since the last take().

    A phase is what the host does or waits for. Nothing waits for a GPU for the sake of this clock:
    there training is over, as far as the host can tell, when its kernels are queued, and whoever
    needs its result waits for it, mostly the coding threads in `encode`. A phase within another one
    counts by itself and not in the outer one. Threads add up, so that the phases may sum to more
    than the wall's time; without coding threads they do not.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.lock = threading.Lock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """What happens inside of `with phases("train"):` counts as that phase."""
        outer, before = getattr(_this_thread, "phases", None), getattr(_this_thread, "inner", 0.0)
        _this_thread.phases, _this_thread.inner = self, 0.0
        begin = time.perf_counter()
        try:
            yield
        finally:
            lasted = time.perf_counter() - begin
            with self.lock:
                self.seconds[phase] += lasted - _this_thread.inner
            _this_thread.phases, _this_thread.inner = outer, before + lasted

    def each(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time in which each of them is made, on demand, counts as the phase."""
        items, end = iter(items), object()
        while True:
            with self(phase):
                item = next(items, end)
            if item is end:
                return
            yield item

    def take(self) -> dict[str, float]:
        """The seconds of each phase, to the microsecond; begin anew."""
        with self.lock:
            seconds, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return {phase: round(lasted, 6) for phase, lasted in seconds.items()}


def in_phases_of_this_thread(work: Callable[..., T]) -> Callable[..., T]:
    """The same work: on whatever thread it is done, what is within() counts as it would on this."""
    phases = getattr(_this_thread, "phases", None)

    def do(*args: Any) -> T:
        _this_thread.phases, _this_thread.inner = phases, 0.0
        return work(*args)

    return do


def within(phase: str) -> AbstractContextManager[None]:
    """A phase within the one that this thread is in; outside of any nothing counts."""
    phases = getattr(_this_thread, "phases", None)
    return nullcontext() if phases is None else phases(phase)
