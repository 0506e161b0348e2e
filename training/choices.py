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
from training.precision import (
    choose_precision,
    computes_in_bf16,
    probe_precision,
    probe_precision_in_lanes,
)


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

        cohort: how many clients a rank trains at a time. one_by_one: whether they cannot be
        trained together. A CPU is busy with one client: two lanes take it 2.8 times as long
        (docs/LOG.md). The measurements train the model; load its vectors again afterwards. Raises
        ConfigError if the memory does not suffice.
        """
        said, local, task = [], config.local, (model, pictures, config.local)
        use_deterministic_kernels(model.device, self.deterministic != "false")
        if self.precision == "auto":
            seconds = probe_precision(*task)
            self.precision = choose_precision(seconds)
            said.append(_line("precision", self.precision, "a step", seconds))
        if model.device.type == "cuda" and local.optimizer != "SGD":
            said.append(f"lanes: 1, without CUDA graphs: these are SGD's, not {local.optimizer}'s")
        if self.lanes == "auto" and (one_by_one or model.device.type == "cpu"):
            self.lanes = "1"
        if self.lanes == "auto":
            seconds = probe_lanes(*task, self.precision, cohort)
            self.lanes = str(choose_lanes(seconds))
            said.append(_line("lanes", self.lanes, f"a step of {cohort} clients", seconds))
        num_lanes = 1 if one_by_one else int(self.lanes)
        together = f"a step of {num_lanes} clients" if num_lanes > 1 else "a step"
        # Together they keep the device busier, so that more depends on how fast it computes.
        if num_lanes > 1 and config.precision == "auto" and computes_in_bf16(model.device):
            seconds = probe_precision_in_lanes(*task, num_lanes)
            self.precision = choose_precision(seconds)
            said.append(_line("precision", self.precision, together, seconds))
        if self.deterministic == "auto":
            seconds = probe_determinism(*task, self.precision, num_lanes)
            self.deterministic = "true" if choose_determinism(seconds) else "false"
            if seconds:
                said.append(_line("deterministic", self.deterministic, together, seconds))
        use_deterministic_kernels(model.device, self.deterministic == "true")
        return said


def _line(name: str, chosen: str, what: str, seconds: dict) -> str:
    measured = ", ".join(f"{choice} {1e3 * s:.1f} ms" for choice, s in seconds.items())
    return f"{name}: {chosen} ({what} takes {measured})"
