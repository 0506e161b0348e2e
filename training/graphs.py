"""Steps that run without Python: recorded once as CUDA graphs and replayed for all clients.

A small network's step on a GPU takes ten times longer to launch, kernel by kernel, than to compute.
"""

import sys
from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

Step = Callable[[], Tensor | None]
Record = Callable[[Step], Step]
WARM_UP = 3  # steps before the recording, in which libraries choose kernels and take memory


class Graphs:
    """Runs steps, each of which is recorded the first time.

    changed: the tensors that a step changes and that outlive it. To record, a step is run several
    times; then they become what they were. record: turns a step into its recording.
    """

    def __init__(self, changed: list[Tensor], record: Record):
        self.changed, self.record = changed, record
        self.recorded: dict[Hashable, Step] = {}
        self.can_record = True

    def run(self, key: Hashable, step: Step) -> Tensor | None:
        """Take a step. Return what it returns, which stands until the next run.

        The step that is run is the first one that had the key: it may read and write nothing but
        tensors that stay where they are.
        """
        if key not in self.recorded:
            self.recorded[key] = self._record(step)
        return self.recorded[key]()

    def _record(self, step: Step) -> Step:
        """The recording, or the step itself if it cannot be recorded, which is said once."""
        if not self.can_record:
            return step
        before = [tensor.clone() for tensor in self.changed]
        try:
            return self.record(step)
        except torch.OutOfMemoryError:  # without a graph it would not fit either
            raise
        except RuntimeError as error:
            self.can_record = False
            reason = str(error).splitlines()[0]
            print(f"warning: training steps run without CUDA graphs: {reason}", file=sys.stderr)
            return step
        finally:
            for tensor, value in zip(self.changed, before, strict=True):
                tensor.copy_(value)


def recorder(device: torch.device) -> Record:
    """How steps are recorded on a device: on a CPU a step is its own recording."""
    if device.type != "cuda":
        return lambda step: step
    # One stream for all recordings: cuBLAS keeps memory for each stream that it has ever been on.
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    return partial(record_graph, pool=pool, stream=stream)


def record_graph(step: Step, pool: tuple[int, int], stream: torch.cuda.Stream) -> Step:
    """Record a step as a CUDA graph on this stream. Raises RuntimeError if it cannot be.

    The graphs of a pool use the same memory for what does not outlive a step. They never run at
    the same time.
    """
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Threads that encode use the device at the same time; only this one's calls are recorded.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = step()
    finally:
        torch.cuda.set_stream(current)  # torch stays on the other one if ending a recording fails

    def replay() -> Tensor | None:
        graph.replay()
        return result

    return replay
