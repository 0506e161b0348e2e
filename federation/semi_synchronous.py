"""Semi-synchronous federated training: in a round all clients train for about the same time.

SemiSync (Stripelis, Thompson and Ambite 2022, arXiv 2102.02849). A synchronous round in which a
fast client waits for the slow ones wastes its time. Here the slowest client sets the period, and
client k trains as many batches as it manages meanwhile (t_k seconds a batch, n_k batches an epoch):

    period  = lambda * max_k(n_k * t_k)
    steps_k = period / t_k, at least 1

lambda, how many epochs the slowest one trains, is local.epochs; schedule.period_seconds may set the
period in its place. Then all upload, and the server averages as in any synchronous round.
"""

from dataclasses import replace

import numpy as np

from config import Config, ConfigError, Local
from federation.steps import takes_full_gradient
from federation.synchronous import Synchronous
from federation.workload import Workload
from training.local_sgd import batch_sizes

ROUNDING = 1e-9  # a period that is made of whole batches holds all of them


class SemiSynchronous(Synchronous):
    """Everything that a run holds in memory, and its rounds."""

    def _make_workload(self, config: Config) -> Workload:
        """Each client trains the steps that it manages in a period. Raises ConfigError."""
        local, sizes = config.local, self.num_examples
        first = super()._make_workload(config)
        candidates, everybody = first.widths.candidates, np.arange(len(sizes))
        seconds = self.clock.computing_seconds(everybody, 1)  # for an example
        if not seconds[candidates].all():
            raise ConfigError("network.ms_per_example: in semi_synchronous it must be above 0")
        before = sizes * takes_full_gradient(local)  # examples that count before the first step
        period = config.schedule.period_seconds
        period = period or max(first.num_trained[candidates] * seconds[candidates])
        batches = before + np.minimum(local.batch_size, sizes)
        shortest = min(batches[candidates] * seconds[candidates])
        if period < shortest:
            raise ConfigError(
                f"schedule.period_seconds: {period} s are too few for every client; the fastest "
                f"one trains a batch in {shortest:.2g} s"
            )
        steps = [1] * len(sizes)
        for client in candidates:
            num_trainable = max(0.0, period / seconds[client] - before[client])
            steps[client] = steps_of(local, int(sizes[client]), num_trainable)
        return super()._make_workload(replace(config, local=replace(local, client_steps=steps)))


def steps_of(local: Local, num_examples: int, num_trainable: float) -> int:
    """How many batches have together at most `num_trainable` examples, or 1 if none has.

    num_examples: of an epoch, of which as many follow each other as need be.
    """
    epoch = batch_sizes(replace(local, steps=None, epochs=1), num_examples)
    epochs, rest = divmod(num_trainable * (1 + ROUNDING), num_examples)
    return max(1, int(epochs) * len(epoch) + int(np.searchsorted(np.cumsum(epoch), rest, "right")))
