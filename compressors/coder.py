"""What every compressor has: its words, its promises, and how it writes and reads values.

A compressor is a class in a file of its own, derived from Coder, and a line in the table of
compression.py. docs/wire-format.md specifies the bytes of each one.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from layout import Layout
from wire.container import PayloadError, Reader, compress, decompress
from wire.entropy import MAX_LEVEL, decode_integers, encode_integers
from wire.positions import decode_positions, encode_positions
from wire.range_coder import read_varint

Buffer = bytes | memoryview
DENSE, SPARSE, CODED, SPARSE_CODED = range(4)  # the selection byte of the container
COMPRESSED, SMALL_DENSE = 1, 2  # its flags
LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True)
class Words:
    """One fixed word such as "sign", or a form such as "int{}" with a number from low to high."""

    form: str
    low: float = 0  # an int means that the number is whole
    high: float = 0

    def number_in(self, word: str) -> float | None:
        """The number in `word`, 0 if it has none; None if `word` is not one of these words."""
        whole = isinstance(self.low, int)
        digits = "([1-9][0-9]*)" if whole else "([0-9.e+-]+)"
        match = re.fullmatch(re.escape(self.form).replace(r"\{\}", digits), word)
        if not match or not match.groups():
            return 0 if match else None
        try:
            number = int(match[1]) if whole else float(match[1])
        except ValueError:
            return None
        return number if self.low <= number <= self.high else None

    def __str__(self) -> str:
        ends = (self.form.format(f"{number:g}") for number in (self.low, self.high))
        return "..".join(dict.fromkeys(ends))


@dataclass(frozen=True)
class Body:
    """The body of a payload. arrives is None where it must be read back from the bytes."""

    selection: int
    kind: int
    positions: Buffer
    values: Buffer
    flags: int = 0
    indices: np.ndarray | None = None  # int64 [n], ascending; None means that all values travel
    arrives: np.ndarray | None = None  # float32 [n]

    def __len__(self) -> int:
        return len(self.positions) + len(self.values)


@dataclass(frozen=True)
class Coder:
    """How float32 values travel; a new coder declares words and kind, and has write() and read().

    What it promises is about C(v), which arrives for a vector v, and E, the mean over seeds.
    Promises hold for vectors of a magnitude that the coder has the range for: their largest value
    is above 1e-30 or, for fp16, within 1e-7 and 65504. tests/compressors measures each of them.
    """

    # The number in its word: bits, an error bound or a rank. None makes a reader of all numbers.
    number: float | None = 0

    words: ClassVar[Words]
    kind: ClassVar[int]  # the byte of the container that announces its values
    variance: ClassVar[float | None] = None  # w in E |C(v) - v|^2 <= w |v|^2, if it is unbiased
    ruins_models: ClassVar[bool] = False  # a whole model, other than a change, arrives useless
    takes_selection: ClassVar[bool] = True  # it can code some entries of a vector
    compressible: ClassVar[bool] = False  # Zstandard may shorten its values, see Packed

    @property
    def unbiased(self) -> bool:
        """Whether E C(v) = v. Rounding to the nearest is biased: it errs alike with every seed."""
        return self.variance is not None

    @property
    def contractive(self) -> bool:
        """Whether E |C(v) - v|^2 <= (1 - d) |v|^2 for a d > 0, as error feedback needs it."""
        return self.unbiased and self.variance < 1

    @property
    def keeps_norms(self) -> bool:
        """Whether E |C(v)|^2 <= 1.05 |v|^2. What is unbiased adds its variance to the norm."""
        return self.unbiased and self.variance <= 0.05

    @property
    def bits_per_value(self) -> float:
        """About how many bits each value takes, without its position; at most, if it varies.

        The number in a coder's word is these bits, unless the coder says otherwise.
        """
        return self.number

    def __str__(self) -> str:
        return self.words.form.format(self.number)

    def write(self, values: np.ndarray, layout: Layout, seed: int) -> Buffer:
        """The bytes of float32 [n], which are the vector of the layout or selected from it."""
        raise NotImplementedError

    @classmethod
    def read(cls, reader: Reader, layout: Layout, count: int) -> np.ndarray:
        """The `count` values that write() wrote, float32. Raises PayloadError.

        They are computed by elementwise operations in a fixed order only, so that all machines
        decode the same bits.
        """
        raise NotImplementedError

    def encode(
        self, values: np.ndarray, indices: np.ndarray | None, layout: Layout, seed: int
    ) -> Body:
        """The body that carries float32 [n] of the vector's `indices`; None means all of them.

        Selected values that would arrive as zero are left out.
        """
        written = self.write(values, layout, seed)
        if indices is not None:
            arrives = self.read(Reader(memoryview(written)), layout, len(values)) != 0
            indices, written = indices[arrives], self.write(values[arrives], layout, seed)
        return in_order(self.kind, written, indices, layout)

    def decode(self, reader: Reader, flags: int, layout: Layout, count: int) -> np.ndarray:
        """The `count` values that encode() sent, float32. Raises PayloadError."""
        return self.read(reader, layout, count)

    @classmethod
    def formats(cls, selected: bool) -> set[tuple[int, int]]:
        """The bytes of selection and kind in its payloads, with or without selected positions."""
        if not selected:
            return {(DENSE, cls.kind)}
        return {(SPARSE, cls.kind), (SPARSE_CODED, cls.kind)} if cls.takes_selection else set()


def in_order(
    kind: int, values: Buffer, indices: np.ndarray | None, layout: Layout, flags: int = 0
) -> Body:
    """Values in the vector's order; selected ones have positions, in the shorter of two codes."""
    if indices is None:
        return Body(DENSE, kind, b"", values, flags)
    rice = encode_positions(indices, layout)
    ones = encode_integers(indices, np.ones(len(indices), np.int16), layout)
    coded = len(ones).to_bytes(4, "little") + ones
    if len(coded) < len(rice):
        return Body(SPARSE_CODED, kind, coded, values, flags, indices)
    return Body(SPARSE, kind, rice, values, flags, indices)


def read_positions(reader: Reader, selection: int, layout: Layout, most: int) -> np.ndarray | None:
    """What in_order() wrote before the values: at most `most` positions, int64, ascending.

    None means that all values travel. Raises PayloadError.
    """
    if selection == SPARSE:
        return decode_positions(reader, layout, most)
    if selection != SPARSE_CODED:
        return None
    code = reader.take("u1", int(reader.take("<u4", 1)[0]))
    indices, levels = read_integers(code.data, layout, most, largest=1)
    if len(levels) and not levels.min() == levels.max() == 1:
        raise PayloadError("positions are coded as levels of 1, and one is another")
    return indices


def read_integers(
    code: memoryview, layout: Layout, most: int, largest: int = MAX_LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """decode_integers(), but for codes of over `most` integers or with some beyond `largest`.

    What a code announces is checked before any work. Raises PayloadError.
    """
    head = bytes(code[:27])  # three numbers of up to 9 bytes
    count, end = read_varint(head, 0)
    if count > most:
        raise PayloadError(f"{count} positions where at most {most} are due")
    if count:
        least, end = read_varint(head, end)
        spread, _ = read_varint(head, end)
        if least + spread > largest:
            raise PayloadError(f"levels of up to {least + spread} where at most {largest} is due")
    return decode_integers(code, layout)


class Packed(Coder):
    """Values of a few bits each: their number of bits, then a packet that Zstandard may shorten."""

    compressible = True
    most_bits: ClassVar[int]

    @property
    def bits_sent(self) -> range:
        """The numbers of bits that its payloads have."""
        return range(self.number, self.number + 1)

    @classmethod
    def packet_size(cls, bits: int, layout: Layout, count: int) -> int:
        """The bytes of a packet of `count` values, which it has before it is compressed."""
        raise NotImplementedError

    @classmethod
    def read_packet(cls, reader: Reader, bits: int, layout: Layout, count: int) -> np.ndarray:
        """The `count` values of a packet, float32. Raises PayloadError."""
        raise NotImplementedError

    def read_bits(self, reader: Reader) -> int:
        """The number of bits of a value. Raises PayloadError."""
        bits = int(reader.take("u1", 1)[0])
        if not 1 <= bits <= self.most_bits:
            raise PayloadError(f"values of {bits} bits are not of kind {self.kind}")
        if self.number is not None and bits not in self.bits_sent:
            raise PayloadError(f"values of {bits} bits, and {self} was agreed on")
        return bits

    def decode(self, reader, flags, layout, count) -> np.ndarray:
        bits = self.read_bits(reader)
        if flags & COMPRESSED:
            size = self.packet_size(bits, layout, count)
            reader = Reader(memoryview(decompress(reader.rest(), size)))
        values = self.read_packet(reader, bits, layout, count)
        reader.finish()
        return values


def with_bits(bits: int, packet: bytes) -> tuple[bytes, int]:
    """The number of bits, then the packet or a shorter Zstandard frame of it; and the flags."""
    frame = compress(packet)
    if len(frame) < len(packet):
        return bytes([bits]) + frame, COMPRESSED
    return bytes([bits]) + packet, 0
