"""Partitions: which client holds which training pictures.

The methods are those of flwr-datasets that split by label or by size. Their names are its class
names in snake case, and they take its arguments. Two of them are written here: iid, which is one
line, and inner_dirichlet, because flwr's own divides zero by zero if alpha is small (flower#4377)
and takes time in proportion to clients x pictures.
"""

import difflib
import inspect
import reprlib
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np

from .errors import DataError, say

PARTITIONERS = {  # name -> class of flwr_datasets.partitioner
    "iid": "IidPartitioner",
    "dirichlet": "DirichletPartitioner",
    "inner_dirichlet": "InnerDirichletPartitioner",
    "pathological": "PathologicalPartitioner",
    "shard": "ShardPartitioner",
    "distribution": "DistributionPartitioner",
    "size": "SizePartitioner",
    "linear": "LinearPartitioner",
    "square": "SquarePartitioner",
    "exponential": "ExponentialPartitioner",
}

REMEDIES = {  # name -> what to do if the method fails or leaves a client without pictures
    "iid": "use fewer clients.total",
    "dirichlet": "use a larger alpha, a min_partition_size of 1 to 9, or fewer clients.total",
    "inner_dirichlet": "use a larger alpha or other partition_sizes",
    "pathological": "use another num_classes_per_partition or fewer clients.total",
    "shard": "set num_shards_per_partition (for example 2), or a smaller shard_size",
    "distribution": "correct distribution_array or preassigned_num_samples_per_label",
    "size": "correct partition_sizes",
    "linear": "use fewer clients.total",
    "square": "use fewer clients.total",
    "exponential": "use fewer clients.total: each gets e times the pictures of the one before",
}

LEAVE_PICTURES_OUT = {"inner_dirichlet", "pathological", "shard", "distribution", "size"}

SET_ELSEWHERE = {  # argument of flwr that the user may not give -> what sets it
    "num_partitions": "clients.total",
    "partition_by": "the labels of the data set",
    "seed": "seed",
}


def _is_whole(value, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_list(value, is_item) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(map(is_item, value))


def _is_alpha(value) -> bool:
    return _is_number(value, 1e-9, 1e9) or _is_list(value, lambda item: _is_number(item, 1e-9, 1e9))


def _is_matrix(value) -> bool:
    def is_row(row):
        return _is_list(row, lambda item: _is_number(item, 0, 1e18)) and len(row) == len(value[0])

    return _is_list(value, is_row)


SWITCH = ("true or false", "true", lambda value: isinstance(value, bool))
COUNT = ("a whole number, at least 1", "2", lambda value: _is_whole(value, 1))
COUNT_OR_NONE = ("a whole number, at least 0", "5", lambda value: _is_whole(value, 0))
MODES = ("random", "deterministic", "first-deterministic")
ARGUMENTS = {  # argument -> (what it must be, an example, a function that tests it)
    "alpha": ("a number from 1e-9 to 1e9, or a list of them", "0.3", _is_alpha),
    "class_assignment_mode": (f"one of {', '.join(MODES)}", MODES[0], lambda v: v in MODES),
    "distribution_array": (
        "a list, for each class, of equally long lists of numbers >= 0",
        "[[0.5, 0.5], [0.1, 0.9]]",
        _is_matrix,
    ),
    "keep_incomplete_shard": SWITCH,
    "min_partition_size": COUNT_OR_NONE,
    "num_classes_per_partition": COUNT,
    "num_shards_per_partition": COUNT,
    "num_unique_labels_per_partition": COUNT,
    "partition_sizes": (
        "a list of whole numbers, at least 1",
        "[100, 200, 300]",
        lambda value: _is_list(value, lambda item: _is_whole(item, 1)),
    ),
    "preassigned_num_samples_per_label": COUNT_OR_NONE,
    "rescale": SWITCH,
    "self_balancing": SWITCH,
    "shard_size": COUNT,
    "shuffle": SWITCH,
}


def partition_labels(
    labels: np.ndarray, num_clients: int, name: str, args: dict, seed: int
) -> list[np.ndarray]:
    """Split the examples with these labels over the clients.

    labels: integers [N].
    name: the method, a key of PARTITIONERS.
    args: the arguments of the method in flwr-datasets, except those that are SET_ELSEWHERE. The
        argument `shuffle` has no effect, since the indices are sorted.
    seed: the result depends on the seed and on the other arguments only.

    Returns for each client the sorted indices, int64, of its examples. No example belongs to two
    clients. If the method leaves out examples, or leaves clients without any, a line on stderr
    says how many.

    Raises DataError if the name or an argument is unknown, if a value is out of range, and if the
    method cannot make such a split.
    """
    labels = np.asarray(labels)
    if name not in PARTITIONERS:
        near = difflib.get_close_matches(name, PARTITIONERS, n=1, cutoff=0)[0]
        raise DataError(
            f"data.partition.name: no partition {name!r}; did you mean {near!r}? "
            f"There are {', '.join(PARTITIONERS)}"
        )
    if not 1 <= num_clients <= len(labels):
        raise DataError(
            f"clients.total: {num_clients} clients cannot share {len(labels)} examples; "
            f"use 1 to {len(labels)} clients"
        )
    args = _check_args(name, args)
    _check_sizes(args, num_clients, len(labels))

    rng = np.random.default_rng(seed)
    # The examples are shuffled first, as flwr's FederatedDataset does it: data sets come sorted by
    # class and file name, and most methods give neighbouring examples to one client.
    order = rng.permutation(len(labels))
    split = OWN_METHODS.get(name, partial(_run_flwr, name))
    clients = [np.sort(order[part]) for part in split(labels[order], num_clients, args, rng)]
    _check_clients(clients, len(labels), name)
    return clients


def _flwr_class(name: str) -> type:
    import flwr_datasets.partitioner  # this takes seconds, so it waits until it is needed

    return getattr(flwr_datasets.partitioner, PARTITIONERS[name])


def _check_args(name: str, args: dict) -> dict:
    """Check the user's arguments against flwr's class; return them with its defaults added."""
    # iid takes no arguments, and importing flwr to learn that costs seconds and 170 MB.
    parameters = {} if name == "iid" else inspect.signature(_flwr_class(name)).parameters
    known = {key: parameters[key].default for key in parameters if key not in SET_ELSEWHERE}
    for key, value in args.items():
        where = f"data.partition.args.{key}"
        if key in SET_ELSEWHERE:
            raise DataError(f"{where}: comes from {SET_ELSEWHERE[key]}; remove it here")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            hint = f"did you mean {near[0]!r}?" if near else "it takes none; remove it"
            raise DataError(f"{where}: {name} has no such argument; {hint}")
        what, example, is_valid = ARGUMENTS[key]
        if value is not None and not is_valid(value):
            raise DataError(f"{where}: {reprlib.repr(value)} is not {what}; for example {example}")
    if name == "inner_dirichlet":
        known["partition_sizes"] = None  # None means that all clients get the same number
    known |= {key: value for key, value in args.items() if value is not None}  # null means default
    for key, value in known.items():
        if value is inspect.Parameter.empty:
            what, example, _ = ARGUMENTS[key]
            raise DataError(
                f"data.partition.args.{key}: {name} needs it: {what}; for example {key}: {example}"
            )
    return known


def _check_sizes(args: dict, num_clients: int, num_examples: int) -> None:
    """Refuse sizes that flwr would refuse late, in many words, or by dividing by zero."""
    sizes = args.get("partition_sizes") or []
    if sizes and len(sizes) != num_clients:
        raise DataError(
            f"data.partition.args.partition_sizes: {len(sizes)} sizes for {num_clients} clients; "
            "give one for each, or change clients.total"
        )
    needed = {
        "partition_sizes": sum(sizes),
        "min_partition_size": (args.get("min_partition_size") or 0) * num_clients,
        "num_shards_per_partition": (args.get("num_shards_per_partition") or 0) * num_clients,
    }
    for key, count in needed.items():
        if count > num_examples:
            raise DataError(
                f"data.partition.args.{key}: {reprlib.repr(args[key])} takes {count} examples of "
                f"{num_examples}; make it smaller, or use fewer clients.total"
            )


def _run_flwr(
    name: str, labels: np.ndarray, num_clients: int, args: dict, rng: np.random.Generator
) -> list[np.ndarray]:
    """Let flwr's partitioner `name` split the examples; all its errors become DataError."""
    import datasets

    partitioner_class = _flwr_class(name)
    seed = int(rng.integers(2**63))
    args = args | {"num_partitions": num_clients, "partition_by": "label", "seed": seed}
    args = {key: args[key] for key in inspect.signature(partitioner_class).parameters}
    if "distribution_array" in args:
        args["distribution_array"] = np.array(args["distribution_array"], float)
    rows = {"label": labels, "index": np.arange(len(labels))}
    # Unless numpy raises, NaN passes through unseen and one client gets all the examples.
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise", divide="raise"):
        warnings.simplefilter("ignore")
        try:
            partitioner = partitioner_class(**args)
            partitioner.dataset = datasets.Dataset.from_dict(rows)
            partitioner.load_partition(0)  # this makes the partitions of all clients
            # The public way to read them is a data set for each client, a millisecond each.
            split = partitioner._partition_id_to_indices
            index = np.asarray(partitioner.dataset["index"][:])  # shard sorts the rows
            return [index[np.asarray(split[client], np.int64)] for client in range(num_clients)]
        except FloatingPointError as error:
            reason = f"its shares are out of the range of numbers ({error})"
            raise DataError(f"data.partition: {name}: {reason}; {REMEDIES[name]}") from error
        except Exception as error:
            reason = textwrap.shorten(str(error), 250, placeholder="...").rstrip(".")
            raise DataError(f"data.partition: {name}: {reason}; {REMEDIES[name]}") from error


def _iid(
    labels: np.ndarray, num_clients: int, args: dict, rng: np.random.Generator
) -> list[np.ndarray]:
    return np.array_split(np.arange(len(labels)), num_clients)  # the examples are shuffled


def _inner_dirichlet(
    labels: np.ndarray, num_clients: int, args: dict, rng: np.random.Generator
) -> list[np.ndarray]:
    """Let every client draw its own mixture of the classes (Hsu et al. 2019, arXiv 1909.06335).

    The distribution is that of flwr's InnerDirichletPartitioner. A client that is not full, chosen
    at random, draws a class from its Dirichlet(alpha) mixture and takes an example of that class;
    this repeats until all clients are full. When a class is used up, it is removed from all
    mixtures, and these are normalised again.
    """
    labels = np.unique(labels, return_inverse=True)[1]
    left = np.bincount(labels)  # [K], the examples of each class that are not yet taken
    num_classes = len(left)
    sizes = args["partition_sizes"] or [len(part) for part in np.array_split(labels, num_clients)]
    if np.size(args["alpha"]) not in (1, num_classes):
        raise DataError(
            f"data.partition.args.alpha: {np.size(args['alpha'])} values for {num_classes} "
            "classes; give one number, or one for each class"
        )

    # The mixtures are logarithms, since a small alpha makes shares far below the smallest float.
    # A Gamma(a) variate is a Gamma(a + 1) variate times U^(1/a).
    alpha = np.array(args["alpha"], float)
    shape = (num_clients, num_classes)
    log_mixtures = np.log(rng.gamma(alpha + 1, size=shape)) + np.log1p(-rng.random(shape)) / alpha

    turns = _random_turns(sizes, rng)
    drawn = np.empty(len(turns), np.int64)  # the class that is drawn in each turn
    done = 0
    while done < len(turns):  # this runs once, and once more for each class that is used up
        classes = _draw_classes(log_mixtures, turns[done:], rng)
        stop = len(classes)  # to become the first turn that draws a class without examples left
        for k in range(num_classes):
            stop = min([stop, *np.flatnonzero(classes == k)[left[k] : left[k] + 1]])
        drawn[done : done + stop] = classes[:stop]
        left -= np.bincount(classes[:stop], minlength=num_classes)
        log_mixtures[:, classes[stop : stop + 1]] = -np.inf
        done += stop

    examples = np.empty(len(turns), np.int64)
    for k in range(num_classes):
        takers = np.flatnonzero(drawn == k)
        examples[takers] = np.flatnonzero(labels == k)[: len(takers)]
    return np.split(examples[np.argsort(turns, kind="stable")], np.cumsum(sizes)[:-1])


def _random_turns(sizes: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Return the clients in the order in which they take examples, each as often as its size.

    At every turn all clients that are not full are equally likely. This is the order in which
    clocks tick that all tick at random at the same rate, each until its client is full.
    """
    clients = np.repeat(np.arange(len(sizes)), sizes)
    ticks = np.cumsum(rng.exponential(size=len(clients)))
    starts = np.concatenate([[0.0], ticks])[np.cumsum(sizes) - sizes]
    return clients[np.argsort(ticks - np.repeat(starts, sizes), kind="stable")]


def _draw_classes(
    log_mixtures: np.ndarray, turns: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw for each turn a class from the mixture of its client.

    log_mixtures: [clients, classes]. turns: the client of each turn.
    """
    num_classes = log_mixtures.shape[1]
    mixtures = np.exp(log_mixtures - log_mixtures.max(axis=1, keepdims=True))
    bounds = np.cumsum(mixtures, axis=1)
    bounds /= bounds[:, -1:]
    # One search serves all clients: the bounds of client c lie between c and c + 1.
    bounds = (bounds + np.arange(len(bounds))[:, None]).ravel()
    found = np.searchsorted(bounds, turns + rng.random(len(turns)), side="right")
    return np.minimum(found - turns * num_classes, num_classes - 1)


OWN_METHODS = {"iid": _iid, "inner_dirichlet": _inner_dirichlet}


def _check_clients(clients: list[np.ndarray], num_examples: int, name: str) -> None:
    """Say which examples or clients a split leaves out; refuse a split that is wrong."""
    num_empty = sum(len(indices) == 0 for indices in clients)
    if num_empty:
        say(
            f"note: partition {name} leaves {num_empty} of {len(clients)} clients without examples;"
            f" they take no part; to change that, {REMEDIES[name]}"
        )
    indices = np.concatenate(clients)
    num_left_out = num_examples - len(indices)
    is_fault = len(np.unique(indices)) < len(indices) or (
        num_left_out and name not in LEAVE_PICTURES_OUT
    )
    if is_fault:
        raise DataError(
            f"data.partition: {name} did not give each example to one client; use another"
        )
    if num_left_out:
        say(f"note: partition {name} leaves {num_left_out} of {num_examples} examples out")
