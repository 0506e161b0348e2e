"""Diversity beyond labels: what else differs between clients, on top of any partition.

Three of the kinds that Kairouz et al. 2021 list (arXiv 1912.04977, section 3.1): quantity skew
(clients hold unequal numbers of pictures), feature skew (their cameras differ) and concept shift
(some clients call the classes by other names).

All of it is applied once, before the pictures go to the device. That is possible because no two
clients share a training picture, and it costs a training step nothing. A picture's noise is then
the same in each epoch, as that of a real camera is. Pictures to evaluate on are the server's: they
and their labels stay as they are.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from .dataset import Dataset
from .errors import say

CHUNK = 500  # pictures that are changed at a time, so that their float32 copies stay small


def skew_quantities(clients: list[np.ndarray], skew: float, seed: int) -> list[np.ndarray]:
    """Let each client keep only a random part of its pictures.

    A client keeps the share exp(-skew * |z|) of its pictures, rounded, and at least one; z is its
    own standard normal number. So the logarithms of the shares are spread like one half of a
    lognormal distribution: at skew 1 a client keeps half of its pictures in the median, and one
    client in ten keeps less than a fifth.

    Pictures are dropped and not moved to other clients, since the partition has decided which
    classes a client holds: a random part keeps its mixture of classes, other clients' pictures
    would change it. So the total shrinks, and a line on stderr says by how much.

    clients: the sorted indices, int64, of each client's pictures. The result has the same form.
    seed: the result depends on it, on the client's number, on `skew` and on the client's pictures.
    """
    if not skew:
        return clients
    kept = []
    for client, indices in enumerate(clients):
        rng = np.random.default_rng([seed, client])
        share = np.exp(-skew * abs(rng.standard_normal()))
        count = min(len(indices), max(1, round(share * len(indices))))
        kept.append(np.sort(rng.permutation(indices)[:count]))
    before, after = sum(map(len, clients)), sum(map(len, kept))
    say(f"note: data.diversity.quantity leaves {before - after} of {before} examples out")
    return kept


def diversify(
    dataset: Dataset,
    clients: list[np.ndarray],
    seed: int,
    noise: float = 0.0,
    blur: float = 0.0,
    brightness: float = 0.0,
    colour: float = 0.0,
    relabelled: float = 0.0,
) -> Dataset:
    """Return the data set as its clients see it: with other training pictures and labels.

    clients: the indices of each client's pictures; no picture belongs to two clients.
    noise, blur, brightness, colour: the largest strengths, see draw_camera(). Each client draws
        its own.
    relabelled: the share, from 0 to 1, of the clients with pictures that use labels of their own,
        see draw_names().
    seed: what a client draws depends on the seed and its number. A stronger setting multiplies the
        same draws, and no setting changes the draws of another one.

    The data set itself is returned, not a copy, if every setting is 0.
    """
    if not any((noise, blur, brightness, colour, relabelled)):
        return dataset
    images, labels = dataset.train_images.numpy().copy(), dataset.train_labels.numpy().copy()
    holders = [client for client, indices in enumerate(clients) if len(indices)]
    order = np.random.default_rng(seed).permutation(holders)
    with_own_names = set(order[: round(relabelled * len(holders))].tolist())
    for client in holders:
        rng, indices = np.random.default_rng([seed, client]), clients[client]
        camera = draw_camera(rng, noise, blur, brightness, colour)
        names = draw_names(rng, len(dataset.class_names))
        if client in with_own_names:
            labels[indices] = names[labels[indices]]
        for start in range(0, len(indices), CHUNK):
            part = indices[start : start + CHUNK]
            images[part] = camera.take(images[part], rng)
    return replace(
        dataset, train_images=torch.from_numpy(images), train_labels=torch.from_numpy(labels)
    )


def draw_names(rng: np.random.Generator, num_classes: int) -> np.ndarray:
    """Draw a labelling, int64 [K]: the label that a client gives to each class.

    It is a random cycle through all classes, so that no class keeps its own label.
    """
    cycle = rng.permutation(num_classes)
    names = np.empty(num_classes, np.int64)
    names[cycle] = np.roll(cycle, 1)
    return names


@dataclass(frozen=True)
class Camera:
    """How one client's pictures differ from the data set's."""

    gains: np.ndarray  # float32 [3], a factor for each colour channel
    blur: float  # standard deviation of the blur, in pixels
    noise: float  # standard deviation of the noise, as a share of the range from black to white

    def take(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Take the pictures uint8 [B, H, W, 3] with this camera.

        The order is that of a camera: the light, then the lens, then the sensor, which rounds, and
        which records no more than white.
        """
        light = blurred(images * self.gains, self.blur)
        if self.noise:
            light += 255 * self.noise * rng.standard_normal(light.shape, np.float32)
        return np.rint(light).clip(0, 255).astype(np.uint8)


def draw_camera(
    rng: np.random.Generator, noise: float, blur: float, brightness: float, colour: float
) -> Camera:
    """Draw a client's camera; each strength is uniform.

    noise: its standard deviation is at most this share of the range from black to white.
    blur: its standard deviation is at most this many pixels.
    brightness: pictures are at most this many stops brighter or darker; a stop is a factor of 2.
    colour: each channel is, besides, at most this many stops brighter or darker.
    """
    noise_draw, blur_draw = rng.random(2).tolist()
    stops = brightness * rng.uniform(-1, 1) + colour * rng.uniform(-1, 1, 3)
    return Camera(np.exp2(stops).astype(np.float32), blur * blur_draw, noise * noise_draw)


def blurred(images: np.ndarray, deviation: float) -> np.ndarray:
    """Blur the pictures, float32 [B, H, W, 3], by a Gaussian; deviation: in pixels.

    The Gaussian is cut off at three deviations. Beyond the border the pixels at the border repeat.
    The sums have a fixed order, so that every machine and number of threads gives equal bits.
    """
    radius = int(np.ceil(3 * deviation))
    if not radius:
        return images
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        margins = [(radius, radius) if a == axis else (0, 0) for a in range(images.ndim)]
        padded, length = np.pad(images, margins, mode="edge"), images.shape[axis]
        shifted = (
            padded.take(range(shift, shift + length), axis) for shift in range(2 * radius + 1)
        )
        images = sum(weight * part for weight, part in zip(weights, shifted, strict=True))
    return images
