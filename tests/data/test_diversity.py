"""data/diversity.py."""

import numpy as np
import pytest
import torch
from helpers.pictures import noise as noise_set

from data import DataError, Dataset, diversify, partition_labels, skew_quantities
from data.diversity import CHUNK, Camera, blurred, draw_camera, draw_names

GREY = 100
STRENGTHS = {"noise": 0.1, "blur": 1.0, "brightness": 1.0, "colour": 0.5, "relabelled": 0.5}
LABELS = np.repeat(np.arange(10), 100)
PARTITIONS = {
    "iid": {},
    "dirichlet": {"alpha": 0.5, "min_partition_size": 1},
    "inner_dirichlet": {"alpha": 0.1},
    "pathological": {"num_classes_per_partition": 3},
    "shard": {"num_shards_per_partition": 2},
    "distribution": {
        "distribution_array": np.linspace(0, 1, 20).reshape(10, 2).tolist(),
        "num_unique_labels_per_partition": 2,
        "preassigned_num_samples_per_label": 5,
    },
    "size": {"partition_sizes": [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]},
    "linear": {},
    "square": {},
    "exponential": {},
}


def grey(num_train: int, side: int = 8, num_classes: int = 3) -> Dataset:
    """Pictures of one level; the labels go round."""
    images = np.full((num_train + 1, side, side, 3), GREY, np.uint8)
    labels = np.arange(num_train + 1) % num_classes
    return Dataset.from_arrays("grey", images, labels, num_train, "abcdefghij"[:num_classes])


def shards(num_examples: int, num_clients: int) -> list[np.ndarray]:
    return np.array_split(np.arange(num_examples), num_clients)


def pixels(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    return dataset.train_images.numpy()[indices].astype(float)


# --- quantity -------------------------------------------------------------------------------------


def test_without_skew_the_split_itself_comes_back(capsys):
    clients = shards(100, 4)
    assert skew_quantities(clients, 0.0, seed=1) is clients
    assert not capsys.readouterr().err


def test_the_logarithms_of_the_shares_are_half_normal(capsys):
    clients = shards(4_000_000, 2000)
    kept = skew_quantities(clients, 0.5, seed=1)
    z = -np.log([len(part) / 2000 for part in kept]) / 0.5  # |z| of 2,000 clients
    assert abs(z.mean() - (2 / np.pi) ** 0.5) < 4 * (1 - 2 / np.pi) ** 0.5 / 2000**0.5
    assert abs((z < 0.6745).mean() - 0.5) < 4 * 0.5 / 2000**0.5  # a normal's quartile
    left = sum(map(len, kept))
    said = f"note: data.diversity.quantity leaves {4_000_000 - left} of 4000000 examples out"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_client_keeps_a_random_part_whatever_the_partition(name):
    labels = np.repeat(np.arange(10), 3000) if name == "exponential" else LABELS
    clients = partition_labels(labels, 10, name, PARTITIONS[name], 0)
    kept, again = (skew_quantities(clients, 1.0, seed=3) for _ in range(2))
    other = skew_quantities(clients, 1.0, seed=4)
    assert all(map(np.array_equal, kept, again)) and not all(map(np.array_equal, kept, other))
    for before, after in zip(clients, kept, strict=True):
        assert after.dtype == np.int64 and 1 <= len(after) <= len(before)
        assert (np.diff(after) > 0).all() and np.isin(after, before).all()


def test_a_clients_mixture_of_classes_stays():
    kept = skew_quantities([np.arange(30_000)], 1.0, seed=0)[0]
    counts = np.bincount(kept % 3)
    assert len(kept) < 29_000 and abs(counts / len(kept) - 1 / 3).max() < 0.015


def test_the_smallest_client_keeps_a_picture_and_an_empty_one_none():
    kept = skew_quantities([np.array([7]), np.array([], np.int64), np.arange(8, 20)], 5.0, seed=2)
    assert kept[0].tolist() == [7] and len(kept[1]) == 0 and len(kept[2]) >= 1


def test_what_a_client_keeps_does_not_depend_on_the_others():
    few, many = (skew_quantities(shards(n * 50, n), 1.0, seed=5) for n in (3, 9))
    assert all(map(np.array_equal, few, many))


# --- cameras --------------------------------------------------------------------------------------


def test_without_diversity_the_data_set_itself_comes_back():
    data = noise_set()
    assert diversify(data, shards(40, 4), seed=1) is data


def test_settings_that_do_nothing_to_a_client_change_no_bit():
    data = noise_set()
    changed = diversify(data, shards(40, 4), seed=1, relabelled=1.0)
    assert torch.equal(changed.train_images, data.train_images)


def test_noise_has_the_clients_deviation():
    data = grey(2 * CHUNK + 100)  # so that the first client's pictures are changed in chunks
    clients = [np.arange(2 * CHUNK), np.arange(2 * CHUNK, 2 * CHUNK + 100)]
    changed = diversify(data, clients, seed=1, noise=0.1)
    for client, indices in enumerate(clients):
        camera = draw_camera(np.random.default_rng([1, client]), 0.1, 0, 0, 0)
        assert 0 < camera.noise < 0.1
        values = pixels(changed, indices) - GREY
        deviation = ((255 * camera.noise) ** 2 + 1 / 12) ** 0.5  # and that of rounding
        assert abs(values.std() / deviation - 1) < 4 / (2 * values.size) ** 0.5
        assert abs(values.mean()) < 4 * deviation / values.size**0.5
    first, second = changed.train_images[0], changed.train_images[CHUNK]
    assert not torch.equal(first, second)


def test_gains_are_those_of_the_stops():
    data, clients = grey(40), shards(40, 20)
    for settings in ({"brightness": 1.0}, {"colour": 0.5}, {"brightness": 0.5, "colour": 0.25}):
        changed = diversify(data, clients, seed=2, **settings)
        stops = np.array([np.log2(pixels(changed, part)[0, 0, 0] / GREY) for part in clients])
        largest = sum(settings.values())
        assert np.abs(stops).max() <= largest + 0.02 and np.ptp(stops) > largest
        if "colour" not in settings:
            assert (np.ptp(stops, axis=1) == 0).all()
        for part in clients:
            assert (pixels(changed, part) == pixels(changed, part)[0, 0, 0]).all()


def test_white_is_the_most_that_is_recorded():
    images = np.full((1, 2, 2, 3), 200, np.uint8)
    camera = draw_camera(np.random.default_rng(0), 0, 0, 0, 0)
    brighter = Camera(np.array([2, 1, 0.001], np.float32), 0.0, 0.0)
    assert brighter.take(images, np.random.default_rng(0))[0, 0, 0].tolist() == [255, 200, 0]
    assert np.array_equal(camera.take(images, np.random.default_rng(0)), images)


@pytest.mark.parametrize("deviation", [0.05, 0.4, 1.0, 3.7])
def test_blur_equals_a_naive_convolution(deviation):
    images = np.random.default_rng(0).random((2, 6, 5, 3), np.float32) * 255
    reach = range(-int(np.ceil(3 * deviation)), int(np.ceil(3 * deviation)) + 1)
    weight = {k: np.exp(-(k**2) / (2 * deviation**2)) for k in reach}
    total = sum(weight.values())
    expected = np.zeros(images.shape)
    for y in range(6):
        for x in range(5):
            for dy in reach:
                for dx in reach:
                    source = images[:, min(max(y + dy, 0), 5), min(max(x + dx, 0), 4)]
                    expected[:, y, x] += weight[dy] * weight[dx] / total**2 * source
    np.testing.assert_allclose(blurred(images, deviation), expected, rtol=1e-5, atol=1e-3)
    assert blurred(images, 0.0) is images


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_no_class_keeps_its_label(num_classes):
    for seed in range(20):
        names = draw_names(np.random.default_rng(seed), num_classes)
        assert sorted(names) == list(range(num_classes))
        assert (names != np.arange(num_classes)).all()


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 3), (0.25, 2), (1.0, 10)])
def test_a_share_of_the_clients_permutes_the_labels(share, count):
    data, clients = grey(100, num_classes=10), shards(100, 10)
    changed = diversify(data, clients, seed=1, relabelled=share)
    own = 0
    for indices in clients:  # each holds every class once
        labels = changed.train_labels.numpy()[indices]
        assert sorted(labels) == list(range(10))
        own += not np.array_equal(labels, np.arange(10))
    assert own == count
    assert torch.equal(changed.test_labels, data.test_labels)


def test_clients_without_pictures_are_not_counted():
    clients = [np.arange(10), *[np.array([], np.int64)] * 9, np.arange(10, 20)]
    changed = diversify(grey(20, num_classes=10), clients, seed=1, relabelled=0.5)
    own = [
        (changed.train_labels[part] != torch.arange(10)).all() for part in (clients[0], clients[-1])
    ]
    assert sum(own) == 1


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTITIONS)
def test_all_of_it_goes_with_any_partition(name):
    labels = np.repeat(np.arange(10), 3000) if name == "exponential" else LABELS
    images = np.full((len(labels) + 1, 2, 2, 3), GREY, np.uint8)
    data = Dataset.from_arrays("grey", images, [*labels, 0], len(labels), "abcdefghij")
    clients = partition_labels(labels, 10, name, PARTITIONS[name], 0)
    clients = skew_quantities(clients, 1.0, seed=1)
    changed = diversify(data, clients, seed=1, **STRENGTHS)
    held = np.zeros(len(labels), bool)
    held[np.concatenate(clients)] = True
    assert (changed.train_images[~held] == GREY).all()  # nobody's pictures stay as they are
    assert (pixels(changed, held) != GREY).mean() > 0.5
    assert np.array_equal(changed.train_labels[~held], labels[~held])
    own = [(changed.train_labels.numpy()[part] != labels[part]).all() for part in clients]
    assert sum(own) == 5 and (changed.train_labels.numpy() != labels).mean() <= held.mean()


def test_the_seed_decides_and_the_data_set_stays():
    data, clients = noise_set(), shards(40, 4)
    before = data.train_images.clone(), data.train_labels.clone()
    one, two, other = (diversify(data, clients, seed, **STRENGTHS) for seed in (1, 1, 2))
    assert torch.equal(one.train_images, two.train_images)
    assert torch.equal(one.train_labels, two.train_labels)
    assert not torch.equal(one.train_images, other.train_images)
    assert torch.equal(data.train_images, before[0]) and torch.equal(data.train_labels, before[1])
    assert one.test_images is data.test_images and one.test_labels is data.test_labels


@pytest.mark.parametrize(("key", "value"), [("noise", 0.05), ("blur", 2.0)])
def test_a_stronger_setting_multiplies_the_same_draws_and_leaves_the_others(key, value):
    zero = dict.fromkeys(("noise", "blur", "brightness", "colour"), 0.0)
    alone = draw_camera(np.random.default_rng(3), **zero | {key: value})
    double = draw_camera(np.random.default_rng(3), 0.1, 4.0, 1.0, 0.5)
    assert getattr(double, key) == 2 * getattr(alone, key) > 0


def test_a_partition_that_gives_a_picture_twice_is_refused(monkeypatch):
    """Diversity rests on it: a picture has one client's camera."""
    from data import partition

    monkeypatch.setitem(partition.OWN_METHODS, "iid", lambda *_: [np.arange(3), np.arange(2, 5)])
    with pytest.raises(DataError, match="did not give each example to one client"):
        partition_labels(np.zeros(5, int), 2, "iid", {}, 0)
