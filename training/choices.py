"""What is `auto` in a config and decided by a measurement on this device, once in a run's life."""

from dataclasses import dataclass

from config import Config
from data import Pictures
from training.determinism import (
    choose_determinism,
    probe_determinism,
    use_deterministic_kernels,
)
from training.flat_model import FlatModel
from training.lane_probe import choose_lanes, probe_lanes
from training.precision import choose_precision, probe_precision


@dataclass
class Choices:
    """How clients are trained. A run records it, and goes on with it on any other day."""

    precision: str  # fp32, bf16, fp16; auto until it has been measured
    deterministic: str  # true, false, auto
    lanes: str  # a whole number, or auto

    @classmethod
    def of(cls, config: Config) -> "Choices":
        """What the config says."""
        return cls(config.precision, config.deterministic, config.local.lanes)

    def measure(
        self, config: Config, model: FlatModel, pictures: Pictures, cohort: int, one_by_one: bool
    ) -> list[str]:
        """Decide all that is auto; return a line for each measurement that was made.

        cohort: how many clients a rank trains in a round. one_by_one: whether they cannot be
        trained together. A CPU is busy with one client: two lanes take it 2.8 times as long
        (docs/LOG.md). The measurements train the model; load its vectors again afterwards.
        """
        said, local = [], config.local
        use_deterministic_kernels(model.device, self.deterministic != "false")
        if self.precision == "auto":
            seconds = probe_precision(model, pictures, local)
            self.precision = choose_precision(seconds)
            said.append(_line("precision", self.precision, "a step", seconds))
        if self.deterministic == "auto":
            seconds = probe_determinism(model, pictures, local, self.precision)
            self.deterministic = "true" if choose_determinism(seconds) else "false"
            if seconds:
                said.append(_line("deterministic", self.deterministic, "a step", seconds))
        use_deterministic_kernels(model.device, self.deterministic == "true")
        if model.device.type == "cuda" and local.optimizer != "SGD":
            said.append(f"lanes: 1, without CUDA graphs: these are SGD's, not {local.optimizer}'s")
        if self.lanes == "auto" and (one_by_one or model.device.type == "cpu"):
            self.lanes = "1"
        if self.lanes == "auto":
            seconds = probe_lanes(model, pictures, local, self.precision, cohort)
            self.lanes = str(choose_lanes(seconds))
            said.append(_line("lanes", self.lanes, f"a step of {cohort} clients", seconds))
        return said


def _line(name: str, chosen: str, what: str, seconds: dict) -> str:
    measured = ", ".join(f"{choice} {1e3 * s:.1f} ms" for choice, s in seconds.items())
    return f"{name}: {chosen} ({what} takes {measured})"
