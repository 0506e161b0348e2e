"""NNCodec 2 (ISO/IEC 15938-17) on the integers that codec.py hands over: bytes and seconds.

    PYTHON benchmarks/nncodec_rival.py FILE.npz

Runs in the environment of requirements-rivals.txt, knows none of our modules, and is started by
codec.py. FILE.npz holds indices int64 [n], levels int32 [n] and shapes (JSON). The last line
printed is JSON: of the setting with the shortest bitstream, `bitstream` (all that a decoder needs
but the scale), `code` (its arithmetic code alone: no names, no shapes), the seconds of each, and
the seconds of decoding the bitstream, whose result is checked.
"""

import itertools
import json
import statistics
import sys
import time

import numpy as np
from nncodec.extensions import deepCABAC
from nncodec.nnc_core import approximator, coder, nnr_model
from nncodec.nnc_core.hdsp.hdsp_tool import HDSP_OPTS_OFF

# Whether initial states are searched for, and the length of the unary code (11 is the default).
# Rows of zeros are always skipped and the scan is by rows: on sparse integers all else is longer.
SETTINGS = list(itertools.product((0, 1), (4, 11)))
QP, QP_DENSITY = -38, 2  # the defaults; integers are not quantised
REPEATS = 3


def bitstream_of(tensors: list[np.ndarray], search: int, unary: int) -> bytes:
    """What nncodec.nnc.compress makes of a dict of int32 arrays; the names are as short as can."""
    named = {str(i): tensor for i, tensor in enumerate(tensors)}
    model = nnr_model.NNRModel(named).model_info
    data = approximator.init_approx_data(named, model, QP_DENSITY, scan_order=0)
    info = approximator.ApproxInfo(data, model, "uniform", 0, QP, False, True, unary - 1, 0)
    settings = {
        "cabac_unary_length_minus1": unary - 1,
        "param_opt_flag": search,
        "partial_data_counter": 0,
        "general_profile_idc": 1,
        "node_id_present_flag": 1,
        "device_id": 0,
        "mps_parent_signalling_enabled_flag": 0,
        "parent_node_id_present_flag": 0,
        "temporal_context_modeling_flag": 0,
        "row_skip_enabled_flag": 1,
        "pre_signalling": 0,
    }
    data = approximator.approx(info.approx_info, model, data, settings)
    return bytes(coder.encode(enc_info=settings, model_info=model, approx_data=data)[0])


def code_of(tensors: list[np.ndarray], search: int, unary: int) -> bytes:
    """The arithmetic code of all tensors one after the other."""
    encoder = deepCABAC.Encoder()
    for tensor in tensors:
        empty = np.zeros(len(tensor), np.int32)
        if tensor.ndim > 1:
            empty = 1 - tensor.reshape(len(tensor), -1).any(1).astype(np.int32)
        encoder.initCtxModels(unary, search)
        encoder.encodeLayer(tensor, 0, 0, 1, 0, 1, empty, *HDSP_OPTS_OFF(), 0, 0)
    return encoder.finish().tobytes()


def decode(bitstream: bytes) -> dict[str, np.ndarray]:
    parts = ("parameter_type", "parameter_dimensions", "parameter_index", "block_identifier")
    model = {part: {} for part in parts}
    model |= {"topology_storage_format": None, "topology_compression_format": None}
    model["performance_maps"] = {"mps": {}, "lps": {}}
    kinds = ("sparsification", "pruning", "unification", "decomposition_performance_map")
    flags = {f"{unit}_{kind}_flag": {} for unit in ("mps", "lps") for kind in kinds}
    model["performance_map_flags"] = flags
    return coder.decode(bytearray(bitstream), model, hls_stats={}, oob_dict={})["parameters"]


def timed(function, *arguments):
    """(result, median seconds)."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - begin)
    return result, statistics.median(seconds)


def main() -> None:
    given = np.load(sys.argv[1])
    shapes = json.loads(str(given["shapes"]))
    sizes = [int(np.prod(shape)) for shape in shapes]
    vector = np.zeros(sum(sizes), np.int32)
    vector[given["indices"]] = given["levels"]
    tensors = [
        part.reshape(shape or [1])
        for part, shape in zip(np.split(vector, np.cumsum(sizes)[:-1]), shapes, strict=True)
    ]
    best = min(SETTINGS, key=lambda setting: len(code_of(tensors, *setting)))
    bitstream, bitstream_seconds = timed(bitstream_of, tensors, *best)
    code, code_seconds = timed(code_of, tensors, *best)
    decoded, decode_seconds = timed(decode, bitstream)
    for i, tensor in enumerate(tensors):
        np.testing.assert_array_equal(decoded[str(i)], tensor)
    print(
        json.dumps(
            {
                "bitstream": len(bitstream),
                "code": len(code),
                "bitstream_seconds": bitstream_seconds,
                "code_seconds": code_seconds,
                "decode_seconds": decode_seconds,
                "setting": best,
            }
        )
    )


if __name__ == "__main__":
    main()
