"""A hundred kills at random moments: nothing is lost, and every run ends with the same model.

    python benchmarks/kills.py [--kills 100] [--seed 0] [--json] [key=value ...]

A short run of two ranks (SCAFFOLD, top-k, error feedback, BatchNorm, a compressed downlink; states
beyond a small budget, so on the disk too; a checkpoint each round) is killed with SIGKILL, either
rank or both, at a moment drawn from the time between the first round of this start and the end of
a rank, so also while it writes a checkpoint. The same command resumes it, and is killed again,
until a start reaches the end; then its model_sha256 and its ledger must be those of a run
that nobody killed, and the next begins. Where one rank was killed, the other must end by itself
within 60 s.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROUNDS = 12
WORDS = ["data.name=digits", "data.fallback=", "model.name=resnet18", "model.width=0.25"]
WORDS += ["clients.total=6", "clients.per_round=4", "clients.state_memory_gib=0.001"]
WORDS += ["local.algorithm=SCAFFOLD", "local.steps=1", "local.batch_size=8", "local.lr=0.05"]
WORDS += ["downlink.mode=change", "downlink.values=qsgd4", "precision=fp32", "trackers=[]"]
WORDS += [f"rounds={ROUNDS}", "checkpoint.every=1", f"evaluation.every={ROUNDS}", "name=run"]
PATIENCE = 60.0  # seconds


class Run:
    """The two ranks of one start, as a launcher would start them."""

    def __init__(self, output: Path):
        self.folder = output / "run-s1"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.logs = [open(output / f"rank{rank}.txt", "w+") for rank in range(2)]
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "main.py", *WORDS, f"output_dir={output}"],
                cwd=ROOT,
                env=os.environ
                | shared
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(self.logs)
        ]

    def rounds(self) -> int:
        """How many rounds this start has done."""
        return len(re.findall(r"^round ", Path(self.logs[0].name).read_text(), re.M))

    def is_running(self) -> bool:
        return all(rank.poll() is None for rank in self.ranks)

    def kill(self, which: list[int]) -> None:
        for rank in which:
            self.ranks[rank].send_signal(signal.SIGKILL)

    def wait(self) -> list[int]:
        """The exit statuses. AssertionError if one rank outlives the other by PATIENCE."""
        while self.is_running():
            time.sleep(0.01)
        begin = time.monotonic()
        while any(rank.poll() is None for rank in self.ranks):
            assert time.monotonic() - begin < PATIENCE, "a rank goes on without the other"
            time.sleep(0.01)
        return [rank.returncode for rank in self.ranks]

    def output(self) -> str:
        return "\n".join(Path(log.name).read_text() for log in self.logs)


def outcome(folder: Path) -> tuple[str, str, int]:
    """(model_sha256, the ledger, rounds logged) of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    rounds = (folder / "rounds.jsonl").read_text().count("\n")
    return summary["model_sha256"], (folder / "ledger.csv").read_text(), rounds


def start(output: Path) -> Run:
    """Start, and wait for the first round of this start, or its end."""
    run = Run(output)
    while run.is_running() and not run.rounds():
        time.sleep(0.01)
    return run


def share_left(run: Run) -> float:
    """Of the rounds after the first."""
    return (ROUNDS - (run.folder / "rounds.jsonl").read_text().count("\n")) / (ROUNDS - 1)


def unkilled(output: Path) -> tuple[tuple[str, str, int], float]:
    """The outcome of a run that nobody kills, and how long both ranks go on after round 1."""
    output.mkdir()
    run, begin = start(output), time.monotonic()
    while run.is_running():
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    assert run.wait() == [0, 0], run.output()
    return outcome(run.folder), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a run again and again.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of another run")
    args = parser.parse_args()
    WORDS.extend(args.overrides)
    draw, done, finished, in_checkpoint = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        unkilled(Path(folder) / "compiling")
        expected, seconds = unkilled(Path(folder) / "unkilled")
        print(f"both ranks go on for {seconds:.1f} s after round 1", flush=True)
        while done < args.kills:
            output = Path(folder) / str(finished)
            output.mkdir()
            while True:
                run = start(output)
                deadline = time.monotonic() + draw.uniform(0, seconds * share_left(run))
                while run.is_running() and time.monotonic() < deadline:
                    time.sleep(0.001)
                if run.is_running() and done < args.kills:
                    in_checkpoint += (run.folder / "checkpoint.tmp").exists()
                    run.kill(draw.choice([[0], [1], [0, 1]]))
                    done += 1
                    run.wait()
                    continue
                statuses = run.wait()
                assert statuses == [0, 0], run.output()
                break
            assert outcome(run.folder) == expected, "a killed run ended in another way"
            finished += 1
            print(f"{done} kills, {finished} runs ended as the one that was not", flush=True)
    if args.json:
        print(json.dumps({"kills": done, "runs": finished, "in_checkpoint": in_checkpoint}))


if __name__ == "__main__":
    main()
