"""data/augment.py."""

from zlib import crc32

import numpy as np
import pytest
import torch
from helpers.pictures import noise

from data import DataError, Dataset, Pictures, hold_out, load_dataset


class Draws:
    """Numbers by purpose from torch's generator, for L clients or one; `asked`: the purposes."""

    def __init__(self, seed: int, *lanes: int):
        self.seed, self.lanes, self.asked = seed, lanes, []

    def below(self, high: int, count: int, purpose: str) -> torch.Tensor:
        self.asked.append(purpose)
        generator = torch.Generator().manual_seed(self.seed + crc32(purpose.encode()))
        return torch.randint(high, (*self.lanes, count), generator=generator)


def normalised(data: Dataset, images: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] to float [B, 3, H, W], the slow way."""
    pixels = data.train_images.numpy().reshape(-1, 3) / 255
    return ((images / 255 - pixels.mean(0)) / pixels.std(0)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (2, False), (0, True), (4, True)])
def test_batches_equal_a_loop_over_pictures(padding, flip):
    data = noise()
    pictures = Pictures(data, torch.device("cpu"), padding, flip)
    indices = torch.tensor([0, 39, 3, 3, 17, 38])
    batch, labels = pictures.train_batch(indices, Draws(5))

    draws, room = Draws(5), 2 * padding + 1
    offsets = torch.zeros(2, 6, dtype=torch.int64)
    if padding:
        offsets = torch.stack([draws.below(room, 6, f"crop {way}") for way in ("row", "column")])
    mirrored = draws.below(2, 6, "mirror") if flip else torch.zeros(6)
    expected = []
    for i, y, x, mirror in zip(indices, *offsets.tolist(), mirrored, strict=True):
        frame = np.zeros((6 + 2 * padding, 5 + 2 * padding, 3), np.uint8)
        frame[padding : padding + 6, padding : padding + 5] = data.train_images[i]
        crop = frame[y : y + 6, x : x + 5]
        expected.append(crop[:, ::-1] if mirror else crop)
    np.testing.assert_allclose(batch, normalised(data, np.stack(expected)), atol=1e-6)
    assert torch.equal(labels, data.train_labels[indices])
    assert batch.dtype == torch.float32 and batch.shape == (6, 3, 6, 5)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_test_batches_are_normalised_and_nothing_else():
    data = noise()
    batch, labels = Pictures(data, torch.device("cpu")).evaluation_batch("test", 2, 6)
    np.testing.assert_allclose(batch, normalised(data, data.test_images[2:6].numpy()), atol=1e-6)
    assert torch.equal(labels, data.test_labels[2:6])
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_channels_may_come_first_in_memory():
    pictures = Pictures(noise(), torch.device("cpu"), channels_last=False)
    batch, _ = pictures.train_batch(torch.arange(6), Draws(5))
    expected, _ = Pictures(noise(), torch.device("cpu")).train_batch(torch.arange(6), Draws(5))
    assert batch.is_contiguous() and torch.equal(batch, expected)


def test_attributes_and_normalisation_of_digits():
    digits = load_dataset("digits", "")
    pictures = Pictures(digits, torch.device("cpu"), padding=0, flip=False)
    assert (pictures.num_classes, pictures.image_size) == (10, (8, 8))
    assert (pictures.num_train, len(pictures.labels["test"])) == (1437, 360)
    draws = Draws(3)
    batch, _ = pictures.train_batch(torch.arange(1437), draws)
    assert draws.asked == []
    assert batch.double().mean((0, 2, 3)).abs().max() < 1e-6
    assert (batch.double().std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6


def test_a_channel_of_one_level_becomes_zero():
    data = Dataset.from_arrays("flat", np.full((3, 4, 4, 3), 77, np.uint8), [0, 1, 0], 2, "ab")
    pictures = Pictures(data, torch.device("cpu"), padding=0)
    batch, _ = pictures.train_batch(torch.arange(2), Draws(0))
    assert torch.equal(batch, torch.zeros(2, 3, 4, 4))


def test_a_seed_gives_a_batch_and_leaves_the_global_generator_alone():
    pictures = Pictures(noise(), torch.device("cpu"))
    indices = torch.arange(40)
    state = torch.get_rng_state()
    one, two, other = (pictures.train_batch(indices, Draws(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_the_batches_of_several_clients_are_made_at_once():
    pictures, indices = Pictures(noise(), torch.device("cpu")), torch.arange(10).view(2, 5)
    draws = Draws(5, 2)
    images, labels = pictures.train_batch(indices, draws)
    for lane, batch in enumerate(indices):

        class Row:
            def below(self, *call):
                return draws.below(*call)[lane]  # noqa: B023

        alone = pictures.train_batch(batch, Row())
        assert torch.equal(images[lane], alone[0]) and torch.equal(labels[lane], alone[1])
        assert images[lane].is_contiguous(memory_format=torch.channels_last)


def test_all_crops_and_mirrors_are_equally_likely():
    picture = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, axis=3)
    data = Dataset.from_arrays("one", np.concatenate([picture, picture]), [0, 0], 1, "a")
    pictures = Pictures(data, torch.device("cpu"), padding=1)
    count = 18_000
    batch, _ = pictures.train_batch(torch.zeros(count, dtype=torch.int64), Draws(0))
    found, counts = batch.flatten(1).unique(dim=0, return_counts=True)
    assert len(found) == 3 * 3 * 2
    assert (counts - count / 18).abs().max() < 5 * (count / 18) ** 0.5


def test_the_data_set_is_left_as_it_was():
    data = noise()
    copy = data.train_images.clone(), data.test_images.clone()
    pictures = Pictures(data, torch.device("cpu"))
    pictures.train_batch(torch.arange(40), Draws(0))
    pictures.evaluation_batch("test", 0, 7)
    assert torch.equal(copy[0], data.train_images) and torch.equal(copy[1], data.test_images)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("index", [-1, 40])
def test_no_picture_before_the_first_or_beyond_the_last_is_served(padding, index):
    pictures = Pictures(noise(), torch.device("cpu"), padding)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        pictures.train_batch(torch.tensor([index]), Draws(0))


# --- crops and a validation split -----------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 1])
def test_crops_of_every_offset_are_cut_from_training_pictures(padding):
    data = noise(num_train=2)
    pictures = Pictures(data, torch.device("cpu"), padding, flip=False, crop=4)
    assert pictures.image_size == (4, 4)
    batch, _ = pictures.train_batch(torch.zeros(2000, dtype=torch.int64), Draws(0))
    frame = np.pad(data.train_images[0].numpy(), ((padding,) * 2, (padding,) * 2, (0, 0)))
    rows, columns = 6 + 2 * padding - 3, 5 + 2 * padding - 3
    crops = [frame[y : y + 4, x : x + 4] for y in range(rows) for x in range(columns)]
    expected = torch.from_numpy(normalised(data, np.stack(crops))).float().flatten(1)
    found = batch.flatten(1)
    nearest = torch.cdist(found, expected, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 1e-4 and len(nearest.indices.unique()) == rows * columns


def test_of_a_picture_that_is_evaluated_the_centre_is_cut():
    data = noise()
    batch, _ = Pictures(data, torch.device("cpu"), crop=3).evaluation_batch("test", 2, 6)
    expected = normalised(data, data.test_images[2:6, 1:4, 1:4].numpy())
    np.testing.assert_allclose(batch, expected, atol=1e-6)


def test_a_crop_larger_than_the_pictures_is_refused():
    with pytest.raises(DataError, match="data.crop: 6 is more than the pictures have, 6x5"):
        Pictures(noise(), torch.device("cpu"), crop=6)


def test_validation_pictures_come_as_a_split_of_their_own():
    split = hold_out(noise(), 0.25, seed=0)
    pictures = Pictures(split, torch.device("cpu"))
    assert list(pictures.labels) == ["test", "validation"] and pictures.num_train == 30
    batch, labels = pictures.evaluation_batch("validation", 0, 100)
    expected = normalised(split, split.validation_images.numpy())
    np.testing.assert_allclose(batch, expected, atol=1e-6)
    assert torch.equal(labels, split.validation_labels)
