"""How much each client trains and sends in a round, by what its device and its link can do."""

import numpy as np

from algorithms import make_algorithm
from compression import OVERHEAD
from config import Config
from federation.budget import ratio_of
from federation.clock import Clock
from federation.densities import bits_per_coordinate, fit_to_budget, fit_to_deadline
from federation.ledger import BYTES_PER_VALUE
from federation.steps import fit_steps, num_trained
from federation.widths import Width, Widths, assign_widths


class Workload:
    """Widths, steps and densities of all clients; vectors have an entry for each client.

    num_examples: pictures of each client, int64; choices: the widths, the widest first;
    num_buffers: float32 values that travel besides the parameters.
    config: the given one with the bits that a budget pays for, and the steps and densities that are
    fitted to the deadline; both ends are built from it. num_trained: examples that a client trains
    on in a round, int64; work: how many examples of the whole network take as long, float64.
    Raises ConfigError.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        num_examples: np.ndarray,
        choices: list[Width],
        num_buffers: int,
    ):
        self.clock, self.num_buffers = clock, num_buffers
        config = fit_to_budget(config, choices[0].num_values, num_buffers, num_examples)
        self.widths: Widths | None = None  # until they are chosen
        algorithm = make_algorithm(config.local.algorithm, **config.local.options)
        self._vectors_down = 1 + bool(algorithm.down)
        # Of changes nobody knows how many a client will have missed: then it is the whole in fp32.
        down, chosen = config.downlink, config.downlink.pruning
        self._bits_down = 8 * BYTES_PER_VALUE
        if down.budget:
            self._bits_down /= ratio_of(down.budget)
        elif down.mode != "change":
            self._bits_down = bits_per_coordinate(down.values, chosen.method, chosen.density)
        self._set_trained(num_trained(config.local, num_examples))
        population, everybody = clock.population, np.arange(len(num_examples))
        candidates = np.flatnonzero(num_examples)
        self.widths = assign_widths(
            config, choices, population.memory_gib, candidates, self._seconds_at
        )
        sizes = self.widths.num_values, num_buffers
        seconds = clock.computing_seconds(everybody, self.widths.work)
        self._set_trained(np.zeros_like(num_examples))  # at first a round without training
        config = fit_steps(config, self.seconds_alone, seconds, num_examples, *sizes)
        self._set_trained(num_trained(config.local, num_examples))
        self.config = fit_to_deadline(config, self.seconds_alone, *sizes)

    def _set_trained(self, num_trained: np.ndarray) -> None:
        self.num_trained = num_trained
        self.work = num_trained * (self.widths.work if self.widths else 1.0)

    def describe(self) -> list[str]:
        """What was chosen for the clients, a line each."""
        lines, config = self.widths.describe(), self.config
        if config.uplink.budget:
            up, pruning = config.uplink, config.pruning
            line = f"uplink.budget {up.budget}: uplink.values={up.values}"
            if pruning.method == "random":
                line += f", pruning.method=random, pruning.density={pruning.density:.4g}"
            shares = up.client_bits or pruning.client_densities
            if max(shares) > min(shares):
                line += f" on average, from {min(shares):.3g} to {max(shares):.3g} by weight"
            lines.append(line)
        if config.downlink.budget:
            down = config.downlink
            line = f"downlink.budget {down.budget}: downlink.mode={down.mode}, "
            lines.append(f"{line}downlink.values={down.values}, where a copy lacks most")
        return lines

    def seconds_alone(
        self, clients: np.ndarray | int, num_bytes: np.ndarray | int | None = None
    ) -> np.ndarray:
        """Each client's round, if it is alone: its slice down, and so many bytes up.

        num_bytes: None means a dense update.
        """
        sizes = self.widths.num_values[clients]
        if num_bytes is None:
            num_bytes = OVERHEAD + BYTES_PER_VALUE * sizes
        down = self._bytes_down(sizes)
        return self.clock.seconds_alone(clients, down, self.work[clients], num_bytes)

    def _seconds_at(self, width: Width) -> np.ndarray:
        """The same for a client that trains this width and sends a dense update."""
        everybody, work = np.arange(len(self.num_trained)), self.num_trained * width.work
        down, up = self._bytes_down(width.num_values), BYTES_PER_VALUE * width.num_values
        return self.clock.seconds_alone(everybody, down, work, OVERHEAD + up)

    def _bytes_down(self, size: np.ndarray | int) -> np.ndarray | int:
        """About what a client with so many parameters receives: whole vectors and the buffers."""
        values = np.ceil(self._vectors_down * size * self._bits_down / 8)
        return (1 + self._vectors_down) * OVERHEAD + values + BYTES_PER_VALUE * self.num_buffers
