"""Batches made on the device: random crops and mirror images, normalised, in a memory format."""

import math
from typing import Protocol

import torch
from torch import Tensor

from .dataset import Dataset
from .errors import DataError


class Draws(Protocol):
    """What augmentation needs of training/draws.py."""

    def below(self, high: int, count: int, purpose: str) -> Tensor:
        """int64 [..., count] from 0 to high - 1, with the leading dimensions of the indices."""


class Pictures:
    """A data set that lies on `device` as uint8 and is served in normalised, augmented batches.

    Normalisation subtracts from each channel the mean of its training pixels and divides by their
    standard deviation. Augmentation (He et al. 2016, section 4.2) applies to training pictures
    only. It pads each with `padding` black pixels on every side, cuts a part out at random, and
    mirrors half of the pictures if `flip` is true. The part has the size of the picture, or
    crop x crop pixels if `crop` is given; then pictures to evaluate on are cut to their centre.
    Batches are channels_last in memory, or contiguous if `channels_last` is false.

    Attributes:
        num_train: N, the number of training pictures.
        num_classes: the number of classes.
        image_size: (H, W) of the pictures in a batch.
        train_labels: int64 [N], on the device.
        labels: split -> int64 [M], on the device. The splits to evaluate on are "test" and, if
            pictures were held out, "validation".

    Raises DataError if the crop is larger than the pictures.
    """

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device,
        padding: int = 4,
        flip: bool = True,
        crop: int | None = None,
        channels_last: bool = True,
    ):
        self.num_train, *side, _ = dataset.train_images.shape
        if crop and crop > min(side):
            raise DataError(
                f"data.crop: {crop} is more than the pictures have, {side[0]}x{side[1]}; lower it"
            )
        self.num_classes = len(dataset.class_names)
        self.image_size = height, width = (crop, crop) if crop else tuple(side)
        self.train_labels = dataset.train_labels.to(device)
        self._padding, self._flip, self._device = padding, flip, device
        self._channels_last = channels_last

        scale, shift = _normalisation(dataset.train_images)
        # Both are expanded to the size of a picture: a CPU multiplies 3,072 values by 3,072 values
        # five times faster than 3 by 3 values 1,024 times.
        self._scale = scale.expand(height, width, 3).contiguous().to(device)
        self._shift = shift.expand(height, width, 3).contiguous().to(device)

        self._train_images = dataset.train_images.to(device)
        top, left = ((whole - cut) // 2 for whole, cut in zip(side, (height, width), strict=True))
        centre = slice(None), slice(top, top + height), slice(left, left + width)
        self._images = {"test": dataset.test_images[centre].to(device)}
        self.labels = {"test": dataset.test_labels.to(device)}
        if len(dataset.validation_labels):
            self._images["validation"] = dataset.validation_images[centre].to(device)
            self.labels["validation"] = dataset.validation_labels.to(device)

    def train_batch(self, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return augmented pictures, float32 [..., B, 3, H, W], and their labels, int64 [..., B].

        indices: int64 [..., B], which training pictures to take; on the device. Leading dimensions
        are those of the draws: several clients' batches may be made at once. Indices out of range
        are an error.
        """
        count = indices.shape[-1]
        images = self._train_images.index_select(0, indices.flatten())
        if self._padding or images.shape[1:3] != self.image_size:
            images = self._crop(images, count, draws)
        if self._flip:
            images = self._mirror(images, count, draws)
        images = self._normalise(images).unflatten(0, indices.shape)
        return images, self.train_labels[indices]

    def evaluation_batch(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the pictures start to stop - 1 of a split, not augmented, and their labels.

        split: a key of `labels`. The pictures are float32 [B, 3, H, W], the labels int64 [B].
        """
        return self._normalise(self._images[split][start:stop]), self.labels[split][start:stop]

    def _crop(self, images: Tensor, batch_size: int, draws: Draws) -> Tensor:
        """Pad the pictures [N, h, w, 3] and cut a part [N, H, W, 3] out, each at its own offset.

        A row of a part is 3W neighbouring bytes, which may start at any pixel. So the padded
        pictures are viewed as a table with a row of 3W bytes for each pixel (most of these rows
        overlap), and the rows of the parts are selected from it.
        """
        (count, *side, _), (height, width) = images.shape, self.image_size
        padding = self._padding
        padded_height, padded_width = (length + 2 * padding for length in side)
        padded = images.new_zeros((count, padded_height, padded_width, 3))
        padded[:, padding : padding + side[0], padding : padding + side[1]] = images
        num_starts = count * padded_height * padded_width - width + 1
        starts = padded.view(-1).as_strided((num_starts, 3 * width), (3, 1))

        offset_y, offset_x = (
            draws.below(room + 1, batch_size, purpose).flatten()
            for room, purpose in (
                (padded_height - height, "crop row"),
                (padded_width - width, "crop column"),
            )
        )
        first = torch.arange(count, device=self._device) * padded_height
        corners = (first + offset_y) * padded_width + offset_x
        rows = torch.arange(height, device=self._device) * padded_width
        selected = (corners[:, None] + rows).view(-1)
        return starts.index_select(0, selected).view(-1, height, width, 3)

    def _mirror(self, images: Tensor, batch_size: int, draws: Draws) -> Tensor:
        """Mirror each of the pictures [N, H, W, 3] left to right with probability 1/2."""
        count = len(images)
        mirrored = draws.below(2, batch_size, "mirror").flatten()
        both = torch.cat([images, images.flip(2)])
        return both.index_select(0, torch.arange(count, device=self._device) + mirrored * count)

    def _normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 [B, H, W, 3] into normalised float32 [B, 3, H, W], in the memory format."""
        images = images.float().mul_(self._scale).add_(self._shift).permute(0, 3, 1, 2)
        return images if self._channels_last else images.contiguous()


def _normalisation(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float32 [3], so that byte * scale + shift has mean 0, variance 1.

    The sums are of integers, so the result does not depend on their order, threads or device.
    """
    width = images.shape[2]
    sums = torch.zeros(2, 3 * width, dtype=torch.int64)
    for chunk in images.split(500):  # a chunk fits in the CPU's cache
        levels = chunk.reshape(-1, 3 * width).int()
        sums += torch.stack([levels.sum(0), (levels * levels).sum(0)])
    count = images.numel() // 3
    scale, shift = [], []
    for total, squares in sums.view(2, width, 3).sum(1).T.tolist():
        variance = (count * squares - total**2) / count**2  # exact up to the division
        deviation = math.sqrt(variance) or 1.0  # a channel of one level becomes zero everywhere
        scale.append(1 / deviation)
        shift.append(-total / count / deviation)
    return torch.tensor(scale), torch.tensor(shift)
