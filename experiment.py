"""A run from its config to its summary: start or resume, report progress, stop cleanly.

Exit statuses: 0 done, 2 bad config, data or output folder (one line on stderr), 130 interrupted
with a checkpoint written.
"""

import os
import signal
import sys
from contextlib import closing
from typing import Any

import torch
from tqdm import tqdm

from bandwidth_analysis import AnalysisError, read_run, write_plots
from config import Config, ConfigError
from data import DataError, save_partition
from distributed import RankLost, Ranks
from federation.synchronous import Federation
from run_folder import RunFinished, RunFolder, RunFolderError
from training.local_sgd import Interrupted, batch_sizes
from training.precision import choose_precision, probe_precision


def main(config: Config, dry_run: bool = False) -> int:
    """Do the run, or with dry_run say what it would be; return the exit status."""
    ranks = None
    try:
        ranks = Ranks(config)
        return plan(config, ranks) if dry_run else run(config, ranks)
    except RunFinished as finished:
        _say(ranks, str(finished))
        return 0
    except (ConfigError, DataError, RunFolderError) as error:
        _say(ranks, f"error: {error}", sys.stderr)
        return 2
    except RankLost as error:
        _say_on_this_rank(f"error: {error}; the same command goes on")
        return 1
    except (Interrupted, KeyboardInterrupt):
        _say(ranks, "interrupted; the same command goes on from the checkpoint", sys.stderr)
        return 130
    except OSError as error:
        _say_on_this_rank(f"error: {error.filename or config.run_folder}: {error.strerror}")
        return 2
    finally:
        if ranks:
            ranks.close()


def run(config: Config, ranks: Ranks) -> int:
    with closing(RunFolder(config.run_folder)) as folder:
        federation = start(config, ranks, folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: _request_stop(federation, number))
        try:
            train(federation)
        except Interrupted:
            federation.save()
            raise
        finally:
            ranks.accelerator.end_training()
        if ranks.is_main:
            finish(federation)
    return 0


def start(config: Config, ranks: Ranks, folder: RunFolder) -> Federation:
    """Claim the run folder and build the federation, from the checkpoint if there is one."""
    folder.refuse_other_runs(config)
    ranks.together(lambda: folder.start(config) if ranks.is_main else None, main_first=True)
    federation = Federation(config, ranks, folder)
    if state := folder.checkpoint():
        federation.load(state)
        _say(ranks, f"resuming {folder.path} after round {federation.progress.round}")
    _announce_data(federation)
    settle_precision(federation)
    ranks.together(lambda: record_environment(federation) if ranks.is_main else None)
    ranks.accelerator.init_trackers("tensorboard")
    return federation


def train(federation: Federation) -> None:
    """All the rounds that are left, with a progress bar, or a line a round without a terminal."""
    config, ranks, progress = federation.config, federation.ranks, federation.progress
    bar = tqdm(
        total=config.rounds,
        initial=progress.round,
        unit="round",
        disable=not (ranks.is_main and sys.stderr.isatty()),
    )
    with bar:
        while progress.round < config.rounds:
            row = federation.run_round()
            if ranks.is_main and row["failures"]:
                tqdm.write(_left_out(row), file=sys.stderr)
            if progress.round % config.checkpoint.every == 0 or progress.round == config.rounds:
                federation.save()
            ranks.accelerator.log(_numbers(row), step=progress.round)
            bar.set_postfix_str(_so_far(federation), refresh=False)
            bar.update()
            if bar.disable:
                left = progress.wall_seconds / progress.round * (config.rounds - progress.round)
                _say(
                    ranks,
                    f"round {progress.round}/{config.rounds}  {_so_far(federation)}  "
                    f"{row['wall_seconds']:.1f} s, {tqdm.format_interval(left)} left",
                )


def settle_precision(federation: Federation) -> None:
    """Turn precision `auto` into what is faster here: once in a run's life, the same everywhere."""
    if federation.trainer.precision != "auto":
        return
    recorded = federation.folder.environment().get("precision")
    seconds = {}
    if recorded is None and federation.ranks.is_main:
        seconds = probe_precision(federation.model, federation.pictures, federation.config.local)
    seconds = federation.ranks.gather_json(seconds)[0]
    federation.trainer.precision = recorded or choose_precision(seconds)
    if seconds:
        measured = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in seconds.items())
        _say(
            federation.ranks, f"precision: {federation.trainer.precision} (a step takes {measured})"
        )


def record_environment(federation: Federation) -> None:
    """Write environment.json and partition.npz; refuse to resume on other data."""
    dataset, folder = federation.dataset, federation.folder
    facts = {
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "fallback": dataset.fallback_reason,
        },
        "partition_sha256": save_partition(
            folder.path / "partition.npz",
            federation.clients,
            dataset.train_labels.numpy(),
            dataset.class_names,
        ),
        "precision": federation.trainer.precision,
    }
    before = folder.environment()
    for key, value in facts.items():
        if before and before.get(key) != value:
            raise RunFolderError(f"{folder.path}: cannot resume, {key} is not what it was")
    folder.write_environment(**facts)


def finish(federation: Federation) -> None:
    """Write summary.json and the plots, and say how it went."""
    config, folder, progress = federation.config, federation.folder, federation.progress
    evaluations = progress.evaluations[-config.evaluation.last :]
    last = [scores["test_accuracy"] for scores in evaluations]
    more = {key: score for key, score in evaluations[-1].items() if not key.startswith("test_")}
    summary = {
        "dataset": federation.dataset.name,
        "model": config.model.name,
        "num_parameters": federation.model.layout.size,
        "num_clients": config.clients.total,
        "rounds_completed": progress.round,
        "test_accuracy": last[-1],
        "test_accuracy_mean": sum(last) / len(last),
        "test_accuracy_mean_over": len(last),
        **more,  # of clients, and on the validation pictures
        **folder.ledger_totals(),
        "wall_seconds": progress.wall_seconds,
        "simulated_seconds": progress.simulated_seconds,
        "density": federation.server.density(),
        "model_sha256": federation.server.sha256(),
    }
    folder.finish(summary, keep_states=config.model.norm_policy == "local")
    pruned = f"; {summary['density']:.2%} of the parameters are not 0"
    if config.pruning.mask.method == "none":
        pruned = ""
    saved = summary["dense_bytes_up"] / max(summary["bytes_up"], 1)
    print(
        f"{summary['test_accuracy']:.2%} test accuracy on {summary['dataset']}"
        f"{' (fallback)' if federation.dataset.fallback_reason else ''} after {progress.round} "
        f"rounds; {summary['bytes_up'] / 1e6:.1f} MB up, {saved:.0f} times less than dense; "
        f"{summary['bytes_down'] / 1e6:.1f} MB down; {summary['wall_seconds']:.0f} s"
        f"{pruned}"
    )
    try:
        write_plots([read_run(folder.path)], folder.path / "plots")
        print(f"results and plots: {folder.path}")
    except AnalysisError as error:
        print(f"results: {folder.path}; no plots: {error}", file=sys.stderr)


def plan(config: Config, ranks: Ranks) -> int:
    """Print the resolved config, the size of the model and of a round, and how long it may take."""
    federation = Federation(config, ranks, RunFolder(config.run_folder))
    layout, num_buffers = federation.model.layout, federation.model.buffer_layout.size
    cohort, num_clients = config.clients.per_round, config.clients.total
    seconds = probe_precision(federation.model, federation.pictures, config.local)
    precision = config.precision if config.precision != "auto" else choose_precision(seconds)
    steps = sum(len(batch_sizes(config.local, len(c))) for c in federation.clients) / num_clients
    estimate = config.rounds * cohort * steps * seconds.get(precision, seconds["fp32"])
    noise = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    if federation.server.mask.awaits_scores:
        federation.server.prune(noise.abs())  # any scores: only the mask's length matters here
    model, _ = federation.server.downlinks["model"].channel.encode(noise, config.rounds)
    updates = [  # one for each density
        federation.server.uplinks["update"].encode(noise, config.rounds, client)[0]
        for client in range(max(1, len(config.pruning.client_densities)))
    ]
    length = sum(map(len, updates)) / len(updates)
    down, up = (cohort * (size + 4 * num_buffers) for size in (len(model), length))
    _say(
        ranks,
        f"{config.to_yaml()}\n"
        f"{layout.size:,} parameters, {num_buffers:,} numbers in norm buffers\n"
        f"about {down / 1e6:,.2f} MB down and {up / 1e6:,.2f} MB up a round\n"
        f"about {tqdm.format_interval(estimate / ranks.size)} for the training of "
        f"{config.rounds} rounds in {precision}",
    )
    return 0


def _announce_data(federation: Federation) -> None:
    data = federation.dataset
    if data.fallback_reason:
        line = "=" * 80
        _say(
            federation.ranks,
            f"{line}\n{data.fallback_reason}\nTraining on {data.name} instead.\n{line}",
        )


def _so_far(federation: Federation) -> str:
    progress = federation.progress
    accuracy = "-"
    if progress.evaluations:
        accuracy = f"{progress.evaluations[-1]['test_accuracy']:.2%}"
    up, down = progress.bytes_up / 1e6, progress.bytes_down / 1e6
    return f"accuracy {accuracy}  {up:.1f} MB up  {down:.1f} MB down"


def _left_out(row: dict[str, Any]) -> str:
    client, reason = next(iter(row["failures"].items()))
    return f"round {row['round']}: {row['num_failed']} clients left out; client {client}: {reason}"


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


def _request_stop(federation: Federation, number: int) -> None:
    """Stop after the batch in progress; a second signal ends the process at once."""
    federation.trainer.stop_requested = True
    signal.signal(number, signal.SIG_DFL)


def _say(ranks: Ranks | None, text: str, file: Any = None) -> None:
    if ranks is None or ranks.is_main:
        print(text, file=file or sys.stdout, flush=True)


def _say_on_this_rank(text: str) -> None:
    rank = os.environ.get("RANK")
    print(text if rank is None else f"rank {rank}: {text}", file=sys.stderr, flush=True)
