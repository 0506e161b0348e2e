"""Pruning: which coordinates of an update are worth sending, and which weights a model keeps.

Vectors are flat and float32; selections and masks are the kept positions, int64, ascending. The
tensors of a model lie one after the other in its vector, so their shapes say where each begins.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from compiled import compiled

Shapes = Sequence[tuple[int, ...]]
Positions = np.ndarray | Tensor  # int64 [k], ascending: an array of a CPU's vector, else a tensor
SAMPLE_STRIDE = 61  # a prime, so that the sample does not march in step with any tensor's shape
COARSE_STRIDE, MANY = 211, 1 << 14  # enough for a k of that many
BLOCK = 64  # entries that are looked at together; most blocks hold nothing large
MAGNITUDE_BITS = 0x7FFFFFFF  # a float32 without its sign: as integers these order as magnitudes do
SPLITMIX64 = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)


# --- selection: what of an update travels ---------------------------------------------------------


def num_kept(density: float, size: int) -> int:
    """How many of `size` coordinates a density keeps: rounded up, so that at least one goes."""
    exact = round(density * size, 6)  # 0.07 * 100 is 7.000000000000001
    return min(size, max(1, math.ceil(exact)))


def density_at(density: float, warmup: Sequence[float], round: int) -> float:
    """The density of a round, counted from 1: warmup[0], warmup[1], ..., then `density`.

    DGC (Lin et al. 2018, arXiv 1712.01887) warms up by 25%, 6.25%, 1.56%, 0.4% to 0.1%.
    """
    return warmup[round - 1] if 0 < round <= len(warmup) else density


def topk(vector: Tensor, k: int) -> Positions:
    """The positions of the k largest magnitudes, int64 [k], ascending; ties go to the lowest index.

    The same set as torch.topk(vector.abs(), k). On a CPU a floor guessed from a sample throws out
    nearly everything in one pass, and only the survivors are ranked: about memory speed.
    """
    if not is_on_cpu(vector):
        return largest_in_rows(vector[None], min(k, vector.numel()))
    if k == 0 or k >= vector.numel():
        return np.arange(min(k, vector.numel()))
    numbers = np.ascontiguousarray(vector.numpy())
    survivors = np.empty(2 * k + 4096, np.int64)
    survivors = survivors[: _gather(numbers, _floor(numbers, k), survivors)]
    if len(survivors) < k:  # the sample was unlucky, or so many tie that they had no room
        survivors = np.arange(len(numbers))
    candidates = numbers.view(np.int32)[survivors] & MAGNITUDE_BITS
    _keep_largest(survivors, candidates, k, np.zeros((2, 1 << 16), np.uint32))
    return survivors[:k].copy()


def topk_per_layer(vector: Tensor, density: float, offsets: Sequence[int]) -> Positions:
    """topk of each tensor on its own; offsets: int [num_tensors + 1] into the vector."""
    kept = [
        start + topk(vector[start:stop], num_kept(density, stop - start))
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    return np.concatenate((np.arange(0), *kept)) if is_on_cpu(vector) else torch.cat(kept)


def topk_per_chunk(vector: Tensor, density: float, chunk: int) -> Positions:
    """topk of each run of `chunk` entries on its own; the last run may be shorter."""
    full = len(vector) - len(vector) % chunk
    if not is_on_cpu(vector):
        rows, rest = vector[:full].view(-1, chunk), vector[None, full:]
        kept = largest_in_rows(rows, num_kept(density, chunk))
        return torch.cat(
            [kept, full + largest_in_rows(rest, num_kept(density, len(vector) - full))]
        )
    magnitudes = np.ascontiguousarray(vector.numpy()).view(np.int32) & MAGNITUDE_BITS
    rows, rest = magnitudes[:full].reshape(-1, chunk), magnitudes[None, full:]
    kept = np.flatnonzero(_topk_rows(rows, num_kept(density, chunk)))
    kept_of_rest = np.flatnonzero(_topk_rows(rest, num_kept(density, rest.size)))
    return np.concatenate((kept, full + kept_of_rest))


def threshold(vector: Tensor, limit: float, relative: bool = False) -> Positions:
    """The positions with abs(value) > limit, or > limit * the largest magnitude if relative."""
    if relative and len(vector):
        limit = limit * torch.stack(vector.aminmax()).abs().max()
    if not is_on_cpu(vector):
        return (vector.abs() > limit).nonzero().flatten()
    numbers, limit = np.ascontiguousarray(vector.numpy()), np.float32(limit)
    # The system gives memory as it is written, so that room for all positions costs nothing.
    kept = np.empty(len(numbers) + 2 * BLOCK, np.int64)
    return kept[: _gather(numbers, np.nextafter(limit, np.float32(np.inf)), kept)].copy()


def random(size: int, k: int, seed: int) -> np.ndarray:
    """k of `size` positions, int64 [k], ascending, drawn from `seed` (0 <= seed < 2^64) alone.

    Those whose hash is among the k smallest; the hash of position i is output i of SplitMix64
    (Steele et al. 2014) started at `seed`. Hashes never tie. Both ends draw the same positions.
    """
    if k == 0 or k >= size:
        return np.arange(min(k, size))
    positions, hashes = np.empty(size, np.int64), np.empty(size, np.uint64)
    largest = 2**64 - 1
    likely = min(largest, 2**64 * (k + 6 * math.isqrt(k) + 10) // size)  # k are below: 6 sigma
    count = _gather_hashes(np.uint64(seed), np.uint64(likely), positions, hashes)
    if count < k:
        count = _gather_hashes(np.uint64(seed), np.uint64(largest), positions, hashes)
    hashes = hashes[:count]
    return positions[:count][hashes <= np.partition(hashes, k - 1)[k - 1]]


def random_by_layer(sizes: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """About k positions in tensors of these sizes, and 1 / the density of each one's tensor.

    Returns int64 [n], ascending, and float32 [n]. A tensor's seed is `seed` + its offset.
    """
    counts, starts = layer_counts(sizes, k), np.cumsum(sizes) - sizes
    spans = zip(starts.tolist(), sizes.tolist(), counts.tolist(), strict=True)
    chosen = [start + random(size, count, seed + start) for start, size, count in spans]
    factors = (sizes / np.maximum(counts, 1)).astype(np.float32)
    return np.concatenate(chosen), np.repeat(factors, counts)


def layer_counts(sizes: np.ndarray, k: int) -> np.ndarray:
    """How many entries of each tensor travel where about k do in all, int64; at least one of each.

    The variance of a random choice is least if densities are in proportion to the root mean squares
    of tensors (Neyman 1934), which are about in proportion to size^(-1/3) (docs/LOG.md).
    """
    wanted, counts = np.cbrt(sizes.astype(float)) ** 2, np.zeros(len(sizes))
    for _ in sizes:  # what a tensor that travels whole cannot take, the others get
        whole = counts >= sizes
        left = max(0, k - sizes[whole].sum()) / max(wanted[~whole].sum(), 1e-300)
        counts = np.minimum(sizes, np.where(whole, sizes, wanted * left))
    return np.minimum(sizes, np.maximum(1, np.rint(counts))).astype(np.int64)


def _floor(numbers: np.ndarray, k: int) -> np.float32:
    """A magnitude that at least k entries reach, with high probability, and not many more do."""
    sample = np.abs(numbers[:: SAMPLE_STRIDE if k < MANY else COARSE_STRIDE])
    expected = k * len(sample) / len(numbers)
    rank = min(len(sample), math.ceil(expected + 4 * math.sqrt(expected)) + 1)
    return np.partition(sample, len(sample) - rank)[len(sample) - rank]


@compiled
def _gather(numbers, floor, out):
    """Write the positions whose magnitude is not below floor (so NaN too); return how many.

    numbers: float32 [n]; out: int64; where they have no room in it, 0 is returned. A position is
    written always and counted only if it stays: without branches the compiler takes many entries
    at once.
    """
    count = 0
    full = len(numbers) - len(numbers) % BLOCK
    for begin in range(0, full, BLOCK):
        any_stays = False
        for j in range(BLOCK):
            any_stays |= not abs(numbers[begin + j]) < floor
        if any_stays:
            if count + 2 * BLOCK > len(out):
                return 0
            for j in range(begin, begin + BLOCK):
                out[count] = j
                count += not abs(numbers[j]) < floor
    for j in range(full, len(numbers)):
        out[count] = j
        count += not abs(numbers[j]) < floor
    return count


@compiled
def _keep_largest(positions, magnitudes, k, counts):
    """Move the positions of the k largest magnitudes to the front, in order; the first of ties.

    positions: int64 [n]; magnitudes: int32 [n], not negative; 0 < k <= n; counts: zeros [2, 65536].
    The k-th is found by its upper 16 bits and then, of those that have them, by the lower 15.
    """
    for magnitude in magnitudes:
        counts[0, magnitude >> 15] += 1
    upper, missing = _bin_from_above(counts[0], k)
    for magnitude in magnitudes:
        counts[1, magnitude & 32767] += magnitude >> 15 == upper
    lower, ties = _bin_from_above(counts[1], missing)
    kth, kept = upper << 15 | lower, 0
    for i in range(len(positions)):
        tie = magnitudes[i] == kth
        positions[kept] = positions[i]
        kept += magnitudes[i] > kth or tie and ties > 0
        ties -= tie


@compiled
def _bin_from_above(counts, k):
    """The bin in which the k-th from above lies, and which one it is in there."""
    bin = len(counts) - 1
    while counts[bin] < k:
        k -= counts[bin]
        bin -= 1
    return bin, k


def _topk_rows(magnitudes: np.ndarray, k: int) -> np.ndarray:
    """Which entries of int32 [rows, n] are among their row's k largest, bool [rows, n].

    Ties go to the lowest index; 0 < k <= n, or no entries.
    """
    if not magnitudes.size:
        return np.zeros(magnitudes.shape, bool)
    nth = magnitudes.shape[1] - k
    kth = np.partition(magnitudes, nth, axis=1)[:, nth, None]
    keep = magnitudes >= kth
    for row in np.flatnonzero(np.count_nonzero(keep, axis=1) > k):
        above = magnitudes[row] > kth[row]
        ties = np.flatnonzero(keep[row] & ~above)
        keep[row, ties[k - np.count_nonzero(above) :]] = False
    return keep


def is_on_cpu(vector: Tensor) -> bool:
    return vector.device.type == "cpu"


def largest_in_rows(rows: Tensor, k: int) -> Tensor:
    """The positions in float32 [r, n] of each row's k largest, int64 [r * k], ascending.

    For devices other than the CPU. Ties go to the lowest index: a key has the magnitude in its
    upper 32 bits and, in the lower ones, an index counted from the row's end. Keys never tie, so
    nothing has to be counted, and the device is never waited for.
    """
    if not rows.numel():
        return torch.zeros(0, dtype=torch.int64, device=rows.device)
    num_rows, width = rows.shape
    magnitudes = (rows.contiguous().view(torch.int32) & MAGNITUDE_BITS).long()
    from_the_end = torch.arange(width - 1, -1, -1, device=rows.device)
    keys = (magnitudes << 32 | from_the_end).topk(k, dim=1, sorted=False).values
    columns = width - 1 - (keys & 0xFFFFFFFF)
    starts = torch.arange(0, num_rows * width, width, device=rows.device)
    return (columns + starts[:, None]).flatten().sort().values


@compiled
def _gather_hashes(seed, bound, positions, hashes):
    """Write the positions whose hash is at most `bound`, and those hashes; return how many.

    seed, bound: uint64; positions: int64 [n]; hashes: uint64 [n].
    """
    count, state = 0, seed
    for i in range(len(positions)):
        state += SPLITMIX64[0]
        mixed = (state ^ (state >> np.uint64(30))) * SPLITMIX64[1]
        mixed = (mixed ^ (mixed >> np.uint64(27))) * SPLITMIX64[2]
        mixed ^= mixed >> np.uint64(31)
        positions[count], hashes[count] = i, mixed
        count += mixed <= bound
    return count


# --- masks: which weights a model has -------------------------------------------------------------
# Tensors of two and more dimensions are prunable; biases and norm parameters always stay. No
# tensor is left without a weight: such a layer would make the network constant.


def snip_scores(gradients: Tensor, weights: Tensor) -> Tensor:
    """SNIP's connection sensitivity abs(g * w), scaled to a mean of 1, float32 [n].

    Lee et al. 2019, arXiv 1810.02340, eq. 6. Only ratios matter; float16 carries these well.
    """
    scores = (gradients * weights).abs()
    return scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)


def keep_mask(scores: Tensor, density: float, shapes: Shapes) -> np.ndarray:
    """A mask of the best-scored prunable weights of all tensors together, `density` of them.

    Each prunable tensor keeps its best one in any case. scores: float32 [n], not negative.
    """
    ranked, prunable = scores.clone(), _is_prunable(shapes)
    spans = [(start, stop) for shape, start, stop in _spans(shapes) if len(shape) >= 2]
    best = [start + int(scores[start:stop].argmax()) for start, stop in spans]
    ranked[best] = math.inf
    candidates = np.flatnonzero(prunable)
    k = max(num_kept(density, len(candidates)), len(best))
    kept = candidates[topk(ranked[torch.from_numpy(candidates)], k)]
    return np.sort(np.concatenate((kept, np.flatnonzero(~prunable))))


def erk_counts(shapes: Shapes, density: float) -> list[int]:
    """How many weights each tensor keeps, by RigL's Erdos-Renyi-Kernel rule.

    Evci et al. 2020, arXiv 1911.11134: a tensor's share is proportional to sum(shape) /
    prod(shape), at most 1, and all prunable tensors together keep `density` (up to rounding).
    """
    sizes = [math.prod(shape) for shape in shapes]
    full = {t for t, shape in enumerate(shapes) if len(shape) < 2}
    budget = density * sum(size for t, size in enumerate(sizes) if t not in full)
    while True:
        sparse = [t for t in range(len(shapes)) if t not in full]
        scale = budget / max(1, sum(sum(shapes[t]) for t in sparse))
        too_full = [t for t in sparse if scale * sum(shapes[t]) > sizes[t]]
        if not too_full:
            break
        full.update(too_full)
        budget -= sum(sizes[t] for t in too_full)
    return [
        size if t in full else max(1, round(scale * sum(shapes[t]))) for t, size in enumerate(sizes)
    ]


def random_mask(shapes: Shapes, density: float, seed: int) -> np.ndarray:
    """A mask with erk_counts() weights in each tensor; a tensor's seed is `seed` + its offset.

    A function of its arguments alone: both ends draw it. 0 <= seed < 2^63.
    """
    kept = [
        start + random(stop - start, count, seed + start)
        for (_, start, stop), count in zip(_spans(shapes), erk_counts(shapes, density), strict=True)
    ]
    return np.concatenate(kept)


def sparse_gains(mask: np.ndarray, shapes: Shapes) -> Tensor:
    """Factors for first weights drawn for a dense network, float32 [n]: sqrt(size / kept).

    With them a sparse layer's outputs have a dense one's variance (Evci et al. 2022, arXiv
    2010.03533, per layer); without norm layers a sparse network hardly learns at first.
    """
    gains = [
        torch.full((stop - start,), math.sqrt((stop - start) / max(1, len(inside))))
        for start, stop, inside in _inside(mask, shapes)
    ]
    return torch.cat(gains)


def regrown_share(share: float, round: int, rounds: int) -> float:
    """The share of a tensor's weights that is dropped and regrown: cosine decay, RigL's eq. 1."""
    return share / 2 * (1 + math.cos(math.pi * round / rounds))


def growth_candidates(
    gradients: Tensor, mask: np.ndarray, share: float, shapes: Shapes
) -> np.ndarray:
    """Per tensor the largest gradients outside the mask, as many as `share` of those inside."""
    outside = _outside(gradients, mask)
    candidates = [
        start + _largest_nonzero(outside[start:stop], int(share * len(inside)))
        for start, stop, inside in _inside(mask, shapes)
    ]
    return np.concatenate(candidates)


def drop_and_grow(
    mask: np.ndarray, weights: Tensor, growth: Tensor, share: float, shapes: Shapes
) -> np.ndarray:
    """The next mask: drops `share` of each prunable tensor by abs(weight), regrows by `growth`.

    RigL (Evci et al. 2020) with the clients' summed gradients as in FedDST (Bibikar et al. 2022,
    arXiv 2112.09824). growth: float32 [n], 0 where nobody asks for a weight; what is dropped
    cannot return at once. A tensor drops no more than it can regrow, so its count stays.
    """
    outside, following = _outside(growth, mask), []
    for start, stop, inside in _inside(mask, shapes):
        grown = _largest_nonzero(outside[start:stop], int(share * len(inside)))
        stays = topk(weights[torch.from_numpy(inside)], len(inside) - len(grown))
        following += [inside[stays], start + grown]
    return np.sort(np.concatenate(following))


def _spans(shapes: Shapes) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Each tensor's shape, where it begins and where it ends."""
    start = 0
    for shape in shapes:
        yield shape, start, start + math.prod(shape)
        start += math.prod(shape)


def _is_prunable(shapes: Shapes) -> np.ndarray:  # bool [n]
    sizes = [math.prod(shape) for shape in shapes]
    return np.repeat([len(shape) >= 2 for shape in shapes], sizes)


def _inside(mask: np.ndarray, shapes: Shapes) -> Iterator[tuple[int, int, np.ndarray]]:
    """Each tensor's (start, stop) and its part of the mask."""
    for _, start, stop in _spans(shapes):
        first, last = np.searchsorted(mask, (start, stop))
        yield start, stop, mask[first:last]


def _outside(numbers: Tensor, mask: np.ndarray) -> Tensor:
    """numbers with zeros on the mask."""
    return numbers.index_fill(0, torch.from_numpy(mask), 0.0)


def _largest_nonzero(numbers: Tensor, k: int) -> np.ndarray:
    return topk(numbers, min(k, int(torch.count_nonzero(numbers))))
