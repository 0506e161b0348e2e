"""network/trace.py: by hand, and its inverse."""

import numpy as np
import pytest

from network.trace import Trace, read_trace

# Packets at 0, 50, 50 and 200 ms; then again from 200 ms on
TRACE = Trace(np.array([0, 50, 50, 200]))


def test_packets_add_up_and_the_trace_starts_again():
    times = [0, 0.049, 0.05, 0.199, 0.2, 0.25, 0.4, 20.0]
    packets = [1, 1, 3, 3, 5, 7, 9, 401]  # at 200 ms the last of a cycle and the first of the next
    assert [TRACE.bytes_until(time) for time in times] == [1500 * count for count in packets]


def test_when_bytes_have_arrived():
    assert TRACE.seconds_until(0) == 0.0
    assert TRACE.seconds_until(1) == TRACE.seconds_until(1500) == 0.0
    assert TRACE.seconds_until(1501) == 0.05
    assert TRACE.seconds_until(4 * 1500) == TRACE.seconds_until(5 * 1500) == 0.2
    assert TRACE.seconds_until(400 * 1500) == 20.0


def test_seconds_until_is_the_inverse_of_bytes_until():
    stamps = np.sort(np.random.default_rng(1).integers(0, 3000, 400))
    trace = Trace(stamps)
    for num_bytes in np.random.default_rng(2).integers(1, 3_000_000, 200):
        time = trace.seconds_until(num_bytes)
        assert trace.bytes_until(time) >= num_bytes
        assert time == 0 or trace.bytes_until(time - 1e-3) < num_bytes


def test_the_bandwidth_of_steps_conserves_bytes():
    steps = np.arange(30)  # of 100 ms: packets at 50, 50, 200 = 0, 250, 250, 400 = 0, ...
    assert TRACE.mbps(steps[:4]).tolist() == [2 * 0.12, 2 * 0.12, 2 * 0.12, 2 * 0.12]
    carried = np.cumsum(TRACE.mbps(steps)) * 1e6 / 8 * 0.1
    ends = [TRACE.bytes_until((step + 1) / 10) - TRACE.bytes_until(0) for step in steps]
    assert carried.tolist() == pytest.approx(ends)


def test_a_file_has_a_stamp_a_line(tmp_path):
    path = tmp_path / "lte.up"
    path.write_text("0\n50\n50\n200\n")
    assert read_trace(path).stamps.tolist() == TRACE.stamps.tolist()


@pytest.mark.parametrize(
    "text, line, reason",
    [
        ("", 1, "the file is empty"),
        ("0\n0\n", 2, "ends at 0 ms"),
        ("1\n5\n4\n", 3, "4 ms goes back, behind 5 ms"),
        ("1\n\n2\n", 2, "'' is not a number"),
        ("1\n-2\n", 2, "'-2' is not a number"),
        ("1\n2.5\n", 2, "'2.5' is not a number"),
        ("\udcff", 1, "is not a number"),
    ],
)
def test_a_wrong_file_is_answered_with_its_line(tmp_path, text, line, reason):
    path = tmp_path / "trace"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and reason in str(error.value)
