"""data/partition.py."""

import inspect
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, partition, partition_labels

LABELS = np.repeat(np.arange(10), 100)  # sorted by class, as data sets come


def split(name, num_clients=10, labels=LABELS, seed=0, **args):
    return partition_labels(labels, num_clients, name, args, seed)


def count_classes(clients, labels=LABELS) -> np.ndarray:
    """[clients, classes]"""
    return np.stack([np.bincount(labels[part], minlength=labels.max() + 1) for part in clients])


def check(clients, num_clients, num_examples) -> None:
    """One non-empty sorted int64 array a client, disjoint; `num_examples` in all."""
    assert len(clients) == num_clients
    for part in clients:
        assert part.dtype == np.int64 and len(part) > 0 and (np.diff(part) > 0).all()
    together = np.concatenate(clients)
    assert len(np.unique(together)) == len(together) == num_examples
    assert together.min() >= 0


RAMP = np.linspace(0, 1, 20).reshape(10, 2).tolist()
METHODS = {
    "iid": {},
    "dirichlet": {"alpha": 0.5, "min_partition_size": 1},
    "inner_dirichlet": {"alpha": 0.1},
    "pathological": {"num_classes_per_partition": 3, "class_assignment_mode": "deterministic"},
    "shard": {"num_shards_per_partition": 2},
    "distribution": {
        "distribution_array": RAMP,
        "num_unique_labels_per_partition": 2,
        "preassigned_num_samples_per_label": 5,
    },
    "size": {"partition_sizes": [10, 20, 30, 40, 50, 150, 160, 170, 180, 190]},
    "linear": {},
    "square": {},
    "exponential": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_each_example_to_one_client_by_seed_alone(name):
    labels = np.repeat(np.arange(10), 3000) if name == "exponential" else LABELS
    partition._flwr_class(name)  # importing it does draw from Python's generator
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    first = split(name, labels=labels, **METHODS[name])
    again = split(name, labels=labels, **METHODS[name])
    other = split(name, labels=labels, seed=1, **METHODS[name])
    check(first, 10, len(labels))
    check(other, 10, len(labels))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))
    after = np.random.get_state()[1], random.getstate(), torch.get_rng_state()
    assert np.array_equal(before[0], after[0]) and before[1] == after[1]
    assert torch.equal(before[2], after[2])


def test_our_table_of_methods_and_arguments_is_that_of_flwr():
    assert partition.PARTITIONERS.keys() == METHODS.keys() == partition.REMEDIES.keys()
    arguments = set()
    for name in METHODS:
        arguments |= inspect.signature(partition._flwr_class(name)).parameters.keys()
    assert arguments == partition.ARGUMENTS.keys() | partition.SET_ELSEWHERE.keys()


# --- each method --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(num_examples=st.integers(1, 300), data=st.data())
def test_iid_sizes_differ_by_at_most_one(num_examples, data):
    num_clients = data.draw(st.integers(1, num_examples))
    clients = split("iid", num_clients, np.zeros(num_examples, np.int64))
    check(clients, num_clients, num_examples)
    sizes = [len(part) for part in clients]
    assert max(sizes) - min(sizes) <= 1


def test_iid_does_not_follow_the_order_of_the_data():
    counts = count_classes(split("iid"))
    assert counts.min() > 0 and counts.max() < 30  # about 10 of each class


@pytest.mark.parametrize(
    ("name", "units"), [("linear", np.arange), ("square", lambda n: np.arange(n) ** 2)]
)
def test_sizes_grow_with_the_number_of_the_client(name, units):
    sizes = [len(part) for part in split(name)]
    shares = units(11)[1:] / units(11).sum()
    assert np.abs(sizes[:-1] - shares[:-1] * 1000).max() <= 1


def test_exponential_sizes_grow_by_e():
    sizes = np.array([len(part) for part in split("exponential", 4)])
    assert np.allclose(sizes[1:] / sizes[:-1], np.e, rtol=0.1)


def test_sizes_are_those_asked_for_and_what_is_left_out_is_said(capsys):
    sizes = [1, 2, 3]
    clients = split("size", 3, partition_sizes=sizes)
    assert [len(part) for part in clients] == sizes
    assert "note: partition size leaves 994 of 1000 examples out" in capsys.readouterr().err
    check(split("inner_dirichlet", 3, alpha=0.5, partition_sizes=sizes), 3, 6)


@pytest.mark.parametrize("mode", partition.MODES)
@pytest.mark.parametrize("num_classes", [1, 2, 7, 10])
def test_pathological_gives_exactly_k_classes_a_client(mode, num_classes):
    args = {"num_classes_per_partition": num_classes, "class_assignment_mode": mode}
    counts = count_classes(split("pathological", 20, **args))
    assert ((counts > 0).sum(axis=1) == num_classes).all()


def test_shards_have_few_classes():
    counts = count_classes(split("shard", 50, num_shards_per_partition=2))
    assert (counts.sum(axis=1) == 20).all() and ((counts > 0).sum(axis=1) <= 2).all()
    check(split("shard", 7, shard_size=13, keep_incomplete_shard=True), 7, 1000)
    check(split("shard", 7, shard_size=13), 7, 1000 - 1000 % 13)
    check(split("shard", 7, num_shards_per_partition=3, shard_size=13), 7, 7 * 3 * 13)


def test_distribution_follows_the_array():
    counts = count_classes(split("distribution", **METHODS["distribution"]))
    assert ((counts > 0).sum(axis=1) == 2).all()
    row = counts[:, 5][counts[:, 5] > 0]
    shares = np.array(RAMP[5]) / sum(RAMP[5])
    assert np.abs(row - (5 + 90 * shares)).max() <= 1


# --- Dirichlet: what the law says -----------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_inner_dirichlet_has_the_moments_of_a_dirichlet(alpha):
    # 1000 clients x 50 of 1,000,000 examples: no class is used up, so that a client's counts are
    # n draws from its Dirichlet mixture of K classes.
    num_classes, num_clients, n = 10, 1000, 50
    labels = np.tile(np.arange(num_classes), 100_000)
    clients = split("inner_dirichlet", num_clients, labels, alpha=alpha, partition_sizes=[n] * 1000)
    shares = count_classes(clients, labels) / n
    mean = 1 / num_classes
    variance = (num_classes - 1) / (num_classes**2 * (num_classes * alpha + 1))
    drawn = variance + (mean * (1 - mean) - variance) / n  # and that of the n draws
    assert np.abs(shares.mean(axis=0) - mean).max() < 5 * (drawn / num_clients) ** 0.5
    assert abs(shares.var() / drawn - 1) < 0.12


def test_inner_dirichlet_takes_an_alpha_for_each_class():
    alpha = [8.0, 4.0, 2.0, 1.0]
    labels = np.tile(np.arange(4), 5000)
    clients = split("inner_dirichlet", 200, labels, alpha=alpha, partition_sizes=[10] * 200)
    shares = count_classes(clients, labels).sum(axis=0) / 2000
    assert np.abs(shares - np.array(alpha) / 15).max() < 0.03


def test_inner_dirichlet_has_the_law_of_flwr_while_classes_run_out():
    # Everything is given away, to clients of different sizes: the mean over splits of the
    # sums of squared counts must be that of flwr's own.
    sizes = [5, 10, 20, 45]
    labels = np.repeat(np.arange(4), 20)

    def concentration(clients):
        return [(np.bincount(labels[part], minlength=4) ** 2).sum() for part in clients]

    rng, args = np.random.default_rng(0), {"alpha": 0.3, "partition_sizes": np.array(sizes)}
    theirs = np.array(
        [
            concentration(
                partition._run_flwr("inner_dirichlet", labels, 4, args | {"shuffle": False}, rng)
            )
            for _ in range(120)
        ]
    )
    ours = np.array(
        [
            concentration(
                split("inner_dirichlet", 4, labels, seed, alpha=0.3, partition_sizes=sizes)
            )
            for seed in range(500)
        ]
    )
    error = (theirs.var(axis=0) / len(theirs) + ours.var(axis=0) / len(ours)) ** 0.5
    assert (np.abs(theirs.mean(axis=0) - ours.mean(axis=0)) < 4 * error).all()


@settings(deadline=None, max_examples=60)
@given(
    alpha=st.one_of(st.sampled_from([1e-9, 1e9]), st.floats(1e-3, 100)),
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_inner_dirichlet_always_gives_everything_away(alpha, counts, seed, data):
    labels = np.repeat(np.arange(len(counts)) * 3, counts)  # class numbers with gaps
    num_clients = data.draw(st.integers(1, len(labels)))
    clients = split("inner_dirichlet", num_clients, labels, seed, alpha=alpha)
    check(clients, num_clients, len(labels))
    sizes = [len(part) for part in clients]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(["dirichlet", "pathological", "shard", "linear", "square", "exponential"]),
    num_clients=st.integers(1, 40),
    number=st.integers(1, 12),
    flag=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_is_whole_or_an_error_of_one_line(name, num_clients, number, flag, seed):
    args = {
        "dirichlet": {"alpha": number / 6, "min_partition_size": number, "self_balancing": flag},
        "pathological": {"num_classes_per_partition": number},
        "shard": {"shard_size": number * 5, "keep_incomplete_shard": flag},
    }.get(name, {})
    labels = np.repeat(np.arange(5), [10, 20, 30, 40, 51])
    try:
        clients = split(name, num_clients, labels, seed, **args)
    except DataError as error:
        assert "\n" not in str(error) and "; " in str(error) and len(str(error)) < 500
    else:
        check(clients, num_clients, sum(map(len, clients)))
        assert sum(map(len, clients)) == 151 or name in partition.LEAVE_PICTURES_OUT


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_clients", "args", "message"),
    [
        (
            "dirichle",
            10,
            {},
            "data.partition.name: no partition 'dirichle'; did you mean 'dirichlet'",
        ),
        ("continuous", 10, {}, "There are iid, dirichlet,"),
        ("iid", 0, {}, "clients.total: 0 clients cannot share 1000 examples; use 1 to 1000"),
        ("iid", 1001, {}, "clients.total: 1001 clients cannot share 1000 examples"),
        ("iid", 10, {"alpha": 1}, "args.alpha: iid has no such argument; it takes none"),
        ("dirichlet", 10, {"alfa": 1}, "args.alfa: dirichlet has no such argument; .*'alpha'"),
        ("dirichlet", 10, {}, "args.alpha: dirichlet needs it: .* for example alpha: 0.3"),
        ("dirichlet", 10, {"alpha": None}, "args.alpha: dirichlet needs it"),
        ("dirichlet", 10, {"alpha": 1, "seed": 3}, "args.seed: comes from seed; remove it"),
        ("shard", 10, {"num_partitions": 3}, "args.num_partitions: comes from clients.total"),
        ("dirichlet", 10, {"alpha": 0}, "args.alpha: 0 is not a number from 1e-9"),
        ("dirichlet", 10, {"alpha": "0.3"}, "args.alpha: '0.3' is not a number"),
        ("dirichlet", 10, {"alpha": float("nan")}, "args.alpha: nan is not a number"),
        ("dirichlet", 10, {"alpha": [1.0, -1.0]}, "is not a number from 1e-9"),
        ("dirichlet", 10, {"alpha": [1.0, 1.0]}, "dirichlet: If passing alpha as a List"),
        ("dirichlet", 10, {"alpha": 1, "self_balancing": 1}, "args.self_balancing: 1 is not true"),
        ("dirichlet", 10, {"alpha": 1, "min_partition_size": 101}, "101 takes 1010 examples of"),
        (
            "dirichlet",
            10,
            {"alpha": 1, "min_partition_size": 100},
            "number of attempts .*larger alpha",
        ),
        (
            "dirichlet",
            20,
            {"alpha": 1e-9, "self_balancing": True, "min_partition_size": 0},
            "out of the range of numbers .invalid value.*; use a larger alpha",
        ),
        ("inner_dirichlet", 10, {"alpha": [1, 2]}, "args.alpha: 2 values for 10 classes"),
        ("inner_dirichlet", 3, {"alpha": 1, "partition_sizes": [1, 2]}, "2 sizes for 3 clients"),
        ("inner_dirichlet", 2, {"alpha": 1, "partition_sizes": [1, 1000]}, "takes 1001 examples"),
        ("size", 10, {}, "args.partition_sizes: size needs it"),
        ("size", 2, {"partition_sizes": [1, 0]}, r"\[1, 0\] is not a list of whole numbers"),
        ("size", 2, {"partition_sizes": [1.0, 2]}, "is not a list of whole numbers"),
        ("size", 2, {"partition_sizes": [999, 2]}, "takes 1001 examples of 1000"),
        ("pathological", 10, {"num_classes_per_partition": 11}, "greater than .* unique classes"),
        ("pathological", 10, {"num_classes_per_partition": 0}, "0 is not a whole number"),
        ("pathological", 10, {"num_classes_per_partition": True}, "True is not a whole number"),
        ("pathological", 600, {"num_classes_per_partition": 5}, "assigned to more partitions"),
        (
            "pathological",
            10,
            {"num_classes_per_partition": 2, "class_assignment_mode": "any"},
            "'any' is not one of random, deterministic",
        ),
        ("shard", 10, {}, "shard_size needs to be specified .*for example 2"),
        ("shard", 10, {"num_shards_per_partition": 101}, "101 takes 1010 examples of 1000"),
        ("shard", 10, {"shard_size": 101}, "empty partitions.*smaller shard_size"),
        ("shard", 10, {"shard_size": 112, "keep_incomplete_shard": True}, "empty partitions"),
        ("shard", 10, {"shard_size": 60, "num_shards_per_partition": 2}, "impossible"),
        ("linear", 500, {}, "not greater than 0; use fewer clients.total"),
        ("square", 100, {}, "not greater than 0; use fewer clients.total"),
        ("exponential", 20, {}, "not greater than 0; use fewer clients.total"),
        ("exponential", 800, {}, "out of the range of numbers .overflow.*fewer clients.total"),
        ("distribution", 10, {}, "args.distribution_array: distribution needs it"),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(name, num_clients, args, message):
    with pytest.raises(DataError, match=message) as error:
        partition_labels(LABELS, num_clients, name, args, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("array", "num_clients", "message"),
    [
        ([[1, 2], [3]], 10, "is not a list, for each class"),
        ([[1, -2]] * 10, 10, "is not a list, for each class"),
        ([[1, 2]] * 9, 10, "expected number of rows"),
        ([[1, 2, 3]] * 10, 10, "expected number of columns"),
        ([[0, 0]] * 10, 10, "out of the range of numbers"),
        ([[1, 1, 1]] * 10, 15, "not divisible"),
    ],
)
def test_distribution_arrays_that_cannot_be_used(array, num_clients, message):
    args = METHODS["distribution"] | {"distribution_array": array}
    with pytest.raises(DataError, match=message):
        split("distribution", num_clients, **args | {"preassigned_num_samples_per_label": 0})


def test_clients_without_examples_are_counted_on_stderr(capsys):
    clients = split("dirichlet", 50, alpha=0.001, min_partition_size=0)
    num_empty = sum(len(indices) == 0 for indices in clients)
    assert num_empty and sum(map(len, clients)) == len(LABELS)
    said = capsys.readouterr().err
    assert f"leaves {num_empty} of 50 clients without examples" in said
    assert "use a larger alpha" in said
