"""A run from its config to its summary: start or resume, report progress, stop cleanly.

Exit statuses: 0 done; 1 another process of the run is gone; 2 bad config, data or output folder
(one line on stderr); 3 no client's update could be used for several rounds, with a checkpoint
written; 130 interrupted, with a checkpoint written.
"""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median_low
from typing import Any

from tqdm import tqdm

from bandwidth_analysis import read_run, write_plots
from config import Config, ConfigError, Diversity
from data import DataError, save_partition, save_samples
from distributed import RankLost, Ranks
from federation.compatibility import doubts
from federation.federation import Federation
from federation.ledger import LedgerRow
from federation.schedules import make_schedule
from network.population import write_clients
from run_folder import RunFolder, RunFolderError
from training.choices import Choices
from training.determinism import use_deterministic_kernels
from training.local_sgd import Interrupted, batch_sizes, local_of
from training.precision import choose_precision, probe_precision

# So many rounds in a row in which no client's update can be used end a run.
GIVE_UP_AFTER = 5


class RunFinished(Exception):
    """The run folder already holds this run, finished."""

    def __init__(self, path: Path, summary: dict[str, Any]):
        super().__init__(
            f"{path} is finished: {summary['test_accuracy']:.2%} test accuracy after "
            f"{summary['rounds_completed']} rounds; choose another name= or seed= to run again"
        )
        self.learned_nothing = _learned_nothing(
            summary["empty_rounds"], summary["rounds_completed"]
        )


class NothingLearned(Exception):
    """No client's update could be used for several rounds; the message says why."""


def main(config: Config, dry_run: bool = False) -> int:
    """Do the run, or with dry_run say what it would be; return the exit status."""
    ranks = None
    try:
        ranks = Ranks(config)
        return plan(config, ranks) if dry_run else run(config, ranks)
    except RunFinished as finished:
        _say(ranks, str(finished))
        return 3 if finished.learned_nothing else 0  # as the run itself ended
    except (ConfigError, DataError, RunFolderError) as error:
        _say(ranks, f"error: {error}", sys.stderr)
        return 2
    except NothingLearned as error:
        _say(ranks, f"error: {error}", sys.stderr)
        return 3
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
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: _request_stop(federation, number))
        try:
            run_rounds(federation, folder)
        except (Interrupted, NothingLearned):
            save(federation, folder)
            raise
        finally:
            _ornament("trackers", ranks.accelerator.end_training)
        if ranks.is_main:
            finish(federation, folder)
        _check_that_something_was_learned(federation)
    return 0


def start(config: Config, ranks: Ranks, folder: RunFolder) -> Federation:
    """Build the federation, claim the run folder, and go on from the checkpoint if there is one.

    All that can be refused is refused before the folder is touched.
    """
    if summary := ranks.on_all_ranks(lambda: folder.refuse_other_runs(config)):
        raise RunFinished(folder.path, summary)
    speed = ranks.on_all_ranks(lambda: recorded_speed(config, folder))
    federation = make_schedule(config, ranks, folder.clients, speed)
    ranks.on_all_ranks(lambda: folder.claim(config) if ranks.is_main else None, main_first=True)
    if state := ranks.on_all_ranks(folder.checkpoint):
        federation.load(state)
        _say(ranks, f"resuming {folder.path} after round {federation.progress.round_number}")
    _announce_data(federation)
    _announce_clients(federation)
    resolve_auto(federation, folder.environment())
    ranks.on_all_ranks(lambda: record_environment(federation, folder) if ranks.is_main else None)
    _ornament("trackers", lambda: ranks.accelerator.init_trackers("tensorboard"))
    return federation


def run_rounds(federation: Federation, folder: RunFolder) -> None:
    """All the rounds that are left, with a progress bar, or a line a round without a terminal."""
    config, ranks, progress = federation.config, federation.ranks, federation.progress
    bar = tqdm(
        total=config.rounds,
        initial=progress.round_number,
        unit="round",
        disable=not (ranks.is_main and sys.stderr.isatty()),
    )
    with bar:
        while not federation.is_done:
            row, messages = federation.run_round()
            if ranks.is_main:
                folder.append(row, messages)
                if row["failures"]:
                    tqdm.write(_left_out(row), file=sys.stderr)
            if not federation.is_done:  # a run that is done gets its summary first
                _check_that_something_was_learned(federation)
            if progress.round_number % config.checkpoint.every == 0 or federation.is_done:
                save(federation, folder)
            numbers, step = _numbers(row), progress.round_number
            _ornament("trackers", lambda n=numbers, s=step: ranks.accelerator.log(n, step=s))
            bar.set_postfix_str(_so_far(federation), refresh=False)
            bar.update()
            if bar.disable:
                _say(ranks, _line(federation, row))


def save(federation: Federation, folder: RunFolder) -> None:
    """Write a checkpoint of the last completed round. Called by all ranks."""
    state, ranks = federation.state(), federation.ranks
    if ranks.is_main:
        folder.save(federation.config, state)
    ranks.gather_json(None)  # nobody goes on before the checkpoint stands
    if not federation.is_done or federation.keeps_states:  # else rank 0 may be deleting them
        federation.clients.store.drop_replaced()


def resolve_auto(federation: Federation, recorded: dict[str, Any]) -> None:
    """Decide what is `auto` by what is faster here: once in a run's life, the same everywhere.

    recorded: environment.json, which holds the choices; empty the first time.
    """
    clients, ranks, config = federation.clients, federation.ranks, federation.config
    choices, said = clients.choices, []
    task = config, federation.model, federation.pictures, federation.num_at_once, clients.one_by_one
    if recorded:
        choices = Choices(**{name: recorded[name] for name in vars(choices)})
    else:
        said = ranks.on_all_ranks(lambda: choices.measure(*task) if ranks.is_main else [])
    clients.choices = Choices(**ranks.gather_json(vars(choices))[0])
    use_deterministic_kernels(ranks.device, clients.choices.deterministic == "true")
    for line in said:
        _say(ranks, line)


def recorded_speed(config: Config, folder: RunFolder) -> float:
    """Milliseconds of an example that this run has measured in an earlier start; 0: none."""
    if not config.network.is_measured or config.checkpoint.resume == "never":
        return 0.0
    return folder.environment().get("ms_per_example", 0.0) if folder.checkpoint() else 0.0


def record_environment(federation: Federation, folder: RunFolder) -> None:
    """Write environment.json, partition.npz and, of diverse clients, what they are.

    Diverse links or devices are written to population.csv, samples of diverse data to samples.npz.
    Raises RunFolderError: a run cannot resume on other data or with other clients.
    """
    dataset, population = federation.dataset, federation.clock.population
    facts = {
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "fallback": dataset.fallback_reason,
        },
        "partition_sha256": save_partition(
            folder.path / "partition.npz",
            federation.shards,
            dataset.train_labels.numpy(),
            dataset.class_names,
        ),
        "population_sha256": write_clients(folder.path / "population.csv", population)
        if population.is_diverse
        else None,
        **vars(federation.clients.choices),
        "ms_per_example": federation.ms_per_example or None,
    }
    before = folder.environment()
    for key, value in facts.items():
        if before and before.get(key) != value:
            raise RunFolderError(f"{folder.path}: cannot resume, {key} is not what it was")
    folder.write_environment(**facts, settled=federation.workload.describe())
    if federation.config.data.diversity != Diversity():
        save_samples(
            folder.path / "samples.npz", federation.shards, federation.client_data, dataset
        )


def finish(federation: Federation, folder: RunFolder) -> None:
    """Write summary.json and the plots, and say how it went."""
    config, progress = federation.config, federation.progress
    evaluations = progress.evaluations[-config.evaluation.last :]
    last = [scores["test_accuracy"] for scores in evaluations]
    more = {key: score for key, score in evaluations[-1].items() if not key.startswith("test_")}
    summary = {
        "dataset": federation.dataset.name,
        "model": config.model.name,
        "num_parameters": federation.model.layout.size,
        "num_clients": config.clients.total,
        "rounds_completed": progress.round_number,
        "test_accuracy": last[-1],
        "test_accuracy_mean": sum(last) / len(last),
        "test_accuracy_mean_over": len(last),
        **more,  # of clients, and on the validation pictures
        **folder.ledger_totals(),
        "num_failed": progress.num_failed,
        "num_late": progress.num_late,
        "empty_rounds": progress.empty_rounds,
        "wall_seconds": progress.wall_seconds,
        "simulated_seconds": progress.simulated_seconds,
        "density": federation.server.density(),
        "model_sha256": federation.server.sha256(),
    }
    folder.finish(summary, keep_states=federation.keeps_states)
    is_masked = config.pruning.mask.method != "none"
    pruned = f"; {summary['density']:.2%} of the parameters are not 0" if is_masked else ""
    saved = summary["dense_bytes_up"] / max(summary["bytes_up"], 1)
    failed = f"; {progress.num_failed} updates left out" if progress.num_failed else ""
    _say(
        federation.ranks,
        f"{summary['test_accuracy']:.2%} test accuracy on {summary['dataset']}"
        f"{' (fallback)' if federation.dataset.fallback_reason else ''} after "
        f"{progress.round_number} rounds; {summary['bytes_up'] / 1e6:.1f} MB up, "
        f"{saved:.0f} times less than dense; {summary['bytes_down'] / 1e6:.1f} MB down; "
        f"{summary['wall_seconds']:.0f} s{pruned}{failed}\n"
        f"results: {folder.path}",
    )
    _ornament("plots", lambda: write_plots([read_run(folder.path)], folder.path / "plots"))


def plan(config: Config, ranks: Ranks) -> int:
    """Print the resolved config, the messages of one real round, and how long a run may take.

    The round is the first one. Its clients really train a single step, so that it is soon over, and
    on the simulated clock all of theirs; every message is encoded as in a run.
    """
    more = config.rounds + 1  # or the last one would be evaluated
    quick = replace(config, rounds=more, evaluation=replace(config.evaluation, every=more))
    with tempfile.TemporaryDirectory() as states:
        federation = make_schedule(quick, ranks, Path(states))
        _announce_clients(federation)
        task = federation.model, federation.pictures, config.local
        seconds = ranks.gather_json(ranks.on_all_ranks(lambda: probe_precision(*task)))[0]
        precision = config.precision if config.precision != "auto" else choose_precision(seconds)
        clients = federation.clients
        clients.choices = replace(clients.choices, precision=precision)
        local = clients.config.local
        clients.config = replace(clients.config, local=replace(local, steps=1, client_steps=[]))
        _, messages = federation.run_round()
    shards = enumerate(federation.shards)
    steps = [len(batch_sizes(local_of(local, client), len(shard))) for client, shard in shards]
    estimate = config.rounds * config.clients.per_round * sum(steps) / len(steps)
    estimate *= seconds.get(precision, seconds["fp32"]) / ranks.size
    _say(
        ranks,
        f"{config.to_yaml()}\n"
        f"{federation.model.layout.size:,} parameters, "
        f"{federation.model.buffer_layout.size:,} values in norm buffers\n"
        f"{_summed_up(messages)}\n"
        f"a client trains {min(steps)} to {max(steps)} steps a round, median {median_low(steps)}\n"
        f"about {tqdm.format_interval(estimate)} for {config.rounds} rounds in {precision}",
    )
    return 0


def _summed_up(messages: list[LedgerRow]) -> str:
    lines = ["messages of the first round:"]  # and then one for each kind
    for direction, kind in sorted({(row.direction, row.kind) for row in messages}):
        rows = [row for row in messages if (row.direction, row.kind) == (direction, kind)]
        size, dense = sum(row.bytes for row in rows), sum(row.dense_bytes for row in rows)
        lines.append(
            f"  {len(rows):5} {direction:4} {kind:16} {size / 1e6:12,.3f} MB"
            f"{f', {dense / size:,.1f} times less than dense' if dense else ''}"
        )
    return "\n".join(lines)


def _announce_data(federation: Federation) -> None:
    data, line = federation.dataset, "=" * 80
    if why := data.fallback_reason:
        _say(federation.ranks, f"{line}\n{why}\nTraining on {data.name} instead.\n{line}")


def _announce_clients(federation: Federation) -> None:
    config, ranks = federation.config, federation.ranks
    lines = [*federation.workload.describe(), *(f"note: {doubt}" for doubt in doubts(config))]
    if config.submodel.ordered_dropout and ranks.device.type == "cuda":
        lines.append("submodel.ordered_dropout trains client by client, without CUDA graphs")
    if config.network.is_measured:
        lines.append(f"network.ms_per_example: {federation.ms_per_example:.3g} on this machine")
    for line in lines:
        _say(ranks, line)


def _check_that_something_was_learned(federation: Federation) -> None:
    """Raises NothingLearned after several rounds, or a whole run, without a usable update."""
    progress = federation.progress
    if _learned_nothing(progress.empty_rounds, federation.config.rounds):
        raise NothingLearned(
            f"no client's update could be used in {progress.empty_rounds} rounds in a row (the "
            f"last: {progress.last_failure}); lower local.lr or set local.clip"
        )


def _learned_nothing(empty_rounds: int, rounds: int) -> bool:
    """Tell whether so many empty rounds in a row make a run of so many rounds worthless."""
    return empty_rounds >= min(GIVE_UP_AFTER, rounds)


def _ornament(what: str, work: Callable[[], Any]) -> None:
    """Do what a run is complete without: if it fails, say so and go on."""
    try:
        work()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"warning: {what} left out: {reason}", file=sys.stderr)


def _line(federation: Federation, row: dict[str, Any]) -> str:
    """A round in one line, for logs."""
    progress, rounds = federation.progress, federation.config.rounds
    done = progress.round_number
    left = progress.wall_seconds / done * (rounds - done)
    return (
        f"round {done}/{rounds}  {_so_far(federation)}  {row['wall_seconds']:.1f} s, "
        f"{tqdm.format_interval(left)} left"
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
    federation.clients.stop_requested = True
    signal.signal(number, signal.SIG_DFL)


def _say(ranks: Ranks | None, text: str, file: Any = None) -> None:
    if ranks is None or ranks.is_main:
        print(text, file=file or sys.stdout, flush=True)


def _say_on_this_rank(text: str) -> None:
    rank = os.environ.get("RANK")
    print(text if rank is None else f"rank {rank}: {text}", file=sys.stderr, flush=True)
