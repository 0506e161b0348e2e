"""Batches made on the device: random crop, random mirror, normalisation, memory format."""

import math

import torch
from torch import Tensor

from .dataset import Dataset
from .errors import DataError


class Pictures:
    """A data set on `device` as uint8; batches come out normalised, augmented, channels_last.

    Normalisation subtracts the mean of the training pixels of each channel and divides by their
    standard deviation. Augmentation (He et al. 2016, section 4.2) pads with `padding` black
    pixels, cuts out the old size, or crop x crop, at random, and mirrors half of the pictures if
    `flip`. Of a picture that is evaluated the centre is cut out.

    Attributes: train_labels: int64 [N], on the device; num_train: N; num_classes; image_size: (H,
    W) of a batch; labels: of the splits to evaluate on, test and perhaps validation, int64 [M].

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
                f"data.crop: {crop} is more than the pictures have, {side[0]}x{side[1]}"
            )
        self.num_classes = len(dataset.class_names)
        self.image_size = height, width = (crop, crop) if crop else tuple(side)
        self.train_labels = dataset.train_labels.to(device)
        self._padding, self._flip, self._device = padding, flip, device
        self._channels_last = channels_last

        scale, shift = _normalisation(dataset.train_images)
        # As large as a picture: a CPU multiplies 3,072 numbers by 3,072 numbers five times
        # faster than 1,024 times 3 by 3.
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

    def train_batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures float32 [B, 3, H, W] and labels int64 [B] of `indices`, int64 [B].

        `generator` is on the device. It is left as it was if there is nothing to draw.
        """
        images = self._train_images.index_select(0, indices)
        if self._padding or images.shape[1:3] != self.image_size:
            images = self._crop(images, generator)
        if self._flip:
            images = self._mirror(images, generator)
        return self._normalise(images), self.train_labels[indices]

    def evaluation_batch(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Pictures float32 [stop - start, 3, H, W] of a split as they are, and labels int64."""
        return self._normalise(self._images[split][start:stop]), self.labels[split][start:stop]

    def _crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Pad [B, h, w, 3] and cut [B, H, W, 3] out, each at an offset of its own.

        A row of a crop is 3W neighbouring bytes that may start at any pixel. So we look at the
        padded pictures as a table with a (mostly overlapping) row for each pixel, and select rows.
        """
        (count, *side, _), (height, width) = images.shape, self.image_size
        padding = self._padding
        padded_height, padded_width = (length + 2 * padding for length in side)
        padded = images.new_zeros((count, padded_height, padded_width, 3))
        padded[:, padding : padding + side[0], padding : padding + side[1]] = images
        num_starts = count * padded_height * padded_width - width + 1
        starts = padded.view(-1).as_strided((num_starts, 3 * width), (3, 1))

        offset_y, offset_x = (
            torch.randint(room + 1, (count,), generator=generator, device=self._device)
            for room in (padded_height - height, padded_width - width)
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
        """uint8 [B, H, W, 3] to float32 [B, 3, H, W]; channels stay last in memory, or do not."""
        images = images.float().mul_(self._scale).add_(self._shift).permute(0, 3, 1, 2)
        return images if self._channels_last else images.contiguous()


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
