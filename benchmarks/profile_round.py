"""How busy the device is during a round: the share of the time in which anything ran on it.

    python benchmarks/profile_round.py FOLDER [--config configs/cifar10_resnet18.yaml]
        [--root ../shared/data] [--json] [key=value ...]

One round of the config is recorded by torch.profiler after two of warm-up. On a GPU the device
is busy while at least one kernel or copy runs; on a CPU, while the thread that trains is inside an
operator. FOLDER/round.png shows when: a lane for each kind of work, the darker the busier. Encoding
is what Channel.encode takes, on whatever thread it runs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does

import matplotlib

matplotlib.use("Agg")  # writes files and needs no screen

import matplotlib.pyplot as plt
import numpy as np
import torch
from devices import device_name, wait_for
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from command_line import load_config
from distributed import Ranks
from experiment import resolve_auto
from federation.channel import Channel
from federation.federation import Federation
from federation.schedules import make_schedule

WARM_UP = 2  # rounds
BINS = 1000  # of the picture, from left to right
ENCODING = "encoding (CPU)"


@dataclass(frozen=True)
class Recording:
    """A round of `seconds`, and in each lane [n, 2] seconds at which work began and ended."""

    seconds: float
    lanes: dict[str, np.ndarray]

    def share(self, *names: str) -> float:
        """The share of the round in which work of at least one of the lanes ran."""
        together = np.concatenate([self.lanes[name] for name in names])
        return float(coverage(together, np.array([0.0, self.seconds]))[0])


def coverage(intervals: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of each bin that the union of the intervals covers, float64 [len(edges) - 1].

    intervals: [n, 2], in any order, overlapping or not; edges: ascending.
    """
    if not len(intervals):
        return np.zeros(len(edges) - 1)
    starts, ends = intervals[np.argsort(intervals[:, 0])].T
    reached = np.maximum.accumulate(ends)
    begins = np.append(True, starts[1:] > reached[:-1])  # where nothing that came before still runs
    starts, ends = starts[begins], reached[np.append(np.flatnonzero(begins)[1:] - 1, -1)]
    covered = np.append(0.0, np.cumsum(ends - starts))
    times = np.column_stack([starts, ends]).ravel()
    before = np.interp(edges, times, np.column_stack([covered[:-1], covered[1:]]).ravel())
    return np.diff(before) / np.diff(edges)


def record_round(federation: Federation) -> Recording:
    """Run the next round under the profiler."""
    device, encoded = federation.ranks.device, []
    on_gpu, encode = device.type == "cuda", Channel.encode

    def timed_encode(*args, **settings):
        start = time.perf_counter()
        try:
            return encode(*args, **settings)
        finally:
            encoded.append((start, time.perf_counter()))

    # On a GPU the operators that Python calls are not recorded: that would slow Python down.
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    Channel.encode = timed_encode
    try:
        wait_for(device)
        with profile(activities=[activity]) as profiler:
            torch.zeros(1, device=device)  # the first event: where the profiler's clock has 0
            wait_for(device)
            begin = time.perf_counter()
            federation.run_round()
            wait_for(device)
            seconds = time.perf_counter() - begin
    finally:
        Channel.encode = encode
    lanes = device_lanes(profiler.events(), on_gpu)
    return Recording(seconds, lanes | {ENCODING: np.array(encoded).reshape(-1, 2) - begin})


def device_lanes(events: list, on_gpu: bool) -> dict[str, np.ndarray]:
    """What ran on the device, in seconds since the first event ended."""
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [e for e in events if e.device_type == wanted and not e.is_user_annotation]
    events.sort(key=lambda event: event.time_range.start)
    zero = events[0].time_range.end
    kinds = ("kernels (GPU)", "copies (GPU)") if on_gpu else ("operators (CPU)",)
    lanes = {kind: [] for kind in kinds}
    for event in events[1:]:
        is_copy = on_gpu and event.name.startswith("Memcpy")
        times = event.time_range.start - zero, event.time_range.end - zero
        lanes[kinds[is_copy]].append(times)
    return {kind: np.array(times).reshape(-1, 2) / 1e6 for kind, times in lanes.items()}


def draw(recording: Recording, title: str, file: Path) -> None:
    """Write the picture: a lane a row, the darker the larger the share of the time it worked."""
    edges = np.linspace(0, recording.seconds, BINS + 1)
    rows = np.array([coverage(intervals, edges) for intervals in recording.lanes.values()])
    figure, axes = plt.subplots(figsize=(12, 1.6 + 0.6 * len(rows)), layout="constrained")
    extent = (0, 1e3 * recording.seconds, len(rows) - 0.5, -0.5)
    image = axes.imshow(
        rows, extent=extent, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    for row in range(1, len(rows)):
        axes.axhline(row - 0.5, color="white", linewidth=4)
    axes.set_yticks(range(len(rows)), recording.lanes)
    axes.set_xlabel("milliseconds since the round began")
    axes.set_title(title)
    figure.colorbar(image, label="share of the time")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the picture goes")
    parser.add_argument("--config", type=Path, default=Path("configs/cifar10_resnet18.yaml"))
    parser.add_argument("--root", default="../shared/data", help="where CIFAR-10 is")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as output:
        fixed = [f"data.root={args.root}", f"output_dir={output}", "trackers=[]"]
        fixed += ["rounds=1000000", "evaluation.every=999999"]  # the round has no evaluation
        config = load_config(args.config, [*fixed, *args.overrides])
        federation = make_schedule(config, Ranks(config), Path(output) / "states")
        resolve_auto(federation, {})
        for _ in range(WARM_UP):
            federation.run_round()
        recording = record_round(federation)
    on_device = [name for name in recording.lanes if name != ENCODING]
    busy, device = recording.share(*on_device), device_name(federation.ranks.device)
    shares = {name: recording.share(name) for name in recording.lanes}
    title = f"{args.config.stem}: {device} busy {busy:.1%} of {1e3 * recording.seconds:.0f} ms"
    args.folder.mkdir(parents=True, exist_ok=True)
    draw(recording, title, args.folder / "round.png")
    print(title)
    for name, share in shares.items():
        print(f"  {name:16} {share:6.1%}")
    print(f"picture: {args.folder / 'round.png'}")
    if args.json:
        found = {"busy": busy, "seconds": recording.seconds, "device": device, "shares": shares}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
