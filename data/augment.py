"""Batches made on the device: random crop, random mirror, normalisation, channels last."""

import math

import torch
from torch import Tensor

from .datasets import Dataset


class Pictures:
    """A data set on `device` as uint8; batches come out normalised, augmented, channels_last.

    Normalisation subtracts the mean of the training pixels of each channel and divides by their
    standard deviation. Augmentation (He et al. 2016, section 4.2) pads with `padding` black
    pixels, crops at random to the old size, and mirrors half of the pictures if `flip`.

    Attributes: train_labels, test_labels: int64 [N], [M], on the device; num_classes;
    image_size: (H, W); num_train: N; num_test: M.
    """

    def __init__(self, dataset: Dataset, device: torch.device, padding: int = 4, flip: bool = True):
        self.num_train, height, width, _ = dataset.train_images.shape
        self.num_test = len(dataset.test_labels)
        self.num_classes = len(dataset.class_names)
        self.image_size = (height, width)
        self.train_labels = dataset.train_labels.to(device)
        self.test_labels = dataset.test_labels.to(device)
        self._padding, self._flip, self._device = padding, flip, device

        scale, shift = _normalisation(dataset.train_images)
        # As large as a picture: a CPU multiplies 3,072 numbers by 3,072 numbers five times
        # faster than 1,024 times 3 by 3.
        self._scale = scale.expand(height, width, 3).contiguous().to(device)
        self._shift = shift.expand(height, width, 3).contiguous().to(device)

        self._test_images = dataset.test_images.to(device)
        self._train_images = dataset.train_images.to(device)

    def train_batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures float32 [B, 3, H, W] and labels int64 [B] of `indices`, int64 [B].

        `generator` is on the device. It is left as it was if there is nothing to draw.
        """
        images = self._train_images.index_select(0, indices)
        if self._padding:
            images = self._crop(images, generator)
        if self._flip:
            images = self._mirror(images, generator)
        return self._normalise(images), self.train_labels[indices]

    def test_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Test pictures float32 [stop - start, 3, H, W] and their labels int64, as they are."""
        return self._normalise(self._test_images[start:stop]), self.test_labels[start:stop]

    def _crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Pad [B, H, W, 3] and cut each back to its size, at an offset of its own.

        A row of a crop is 3W neighbouring bytes that may start at any pixel. So we look at the
        padded pictures as a table with a (mostly overlapping) row for each pixel, and select rows.
        """
        (count, height, width, _), padding = images.shape, self._padding
        padded_height, padded_width = height + 2 * padding, width + 2 * padding
        padded = images.new_zeros((count, padded_height, padded_width, 3))
        padded[:, padding : padding + height, padding : padding + width] = images
        num_starts = count * padded_height * padded_width - width + 1
        starts = padded.view(-1).as_strided((num_starts, 3 * width), (3, 1))

        offset_y, offset_x = torch.randint(
            2 * padding + 1, (2, count), generator=generator, device=self._device
        )
        first = torch.arange(count, device=self._device) * padded_height
        corners = (first + offset_y) * padded_width + offset_x
        rows = torch.arange(height, device=self._device) * padded_width
        selected = (corners[:, None] + rows).view(-1)
        return starts.index_select(0, selected).view(-1, height, width, 3)

    def _mirror(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Mirror each of [B, H, W, 3] with probability 1/2."""
        count = len(images)
        mirrored = torch.randint(2, (count,), generator=generator, device=self._device)
        both = torch.cat([images, images.flip(2)])
        return both.index_select(0, torch.arange(count, device=self._device) + mirrored * count)

    def _normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] to float32 [B, 3, H, W]; in memory the channels stay last."""
        return images.float().mul_(self._scale).add_(self._shift).permute(0, 3, 1, 2)


def _normalisation(images: Tensor) -> tuple[Tensor, Tensor]:
    """scale, shift: float32 [3] so that byte * scale + shift has mean 0 and variance 1.

    Sums are of integers, so the result does not depend on their order, threads or device.
    """
    width = images.shape[2]
    sums = torch.zeros(2, 3 * width, dtype=torch.int64)
    for chunk in images.split(500):  # small enough for the CPU's cache
        levels = chunk.reshape(-1, 3 * width).int()
        sums += torch.stack([levels.sum(0), (levels * levels).sum(0)])
    count = images.numel() // 3
    scale, shift = [], []
    for total, squares in sums.view(2, width, 3).sum(1).T.tolist():
        variance = (count * squares - total**2) / count**2  # exact up to the division
        deviation = math.sqrt(variance) or 1.0  # a channel of one level becomes all zeros
        scale.append(1 / deviation)
        shift.append(-total / count / deviation)
    return torch.tensor(scale), torch.tensor(shift)
