"""`network.ms_per_example: auto`: how long this machine trains on an example."""

from statistics import median
from time import perf_counter

from config import Local
from data import Pictures
from distributed import Team
from training.flat_model import FlatModel
from training.graph_engine import make_engine
from training.memory import memory_governed_by
from training.timing import PROBE_SECONDS, seconds_of_a_step

MOST_STEPS = 50


@memory_governed_by("local.batch_size")
def probe_speed(model: FlatModel, pictures: Pictures, local: Local) -> float:
    """Milliseconds of an example: of a batch's forward and backward pass and step, in fp32.

    It is the median over at least three steps, or as many as fit into two seconds. The model keeps
    its weights and buffers. Raises ConfigError if the memory does not suffice.
    """
    parameters, buffers = model.read_parameters().clone(), model.read_buffers().clone()
    engine, size = (
        make_engine(model, local, "fp32", Team()),
        min(local.batch_size, pictures.num_train),
    )
    seconds_of_a_step(engine, pictures, size)  # the first one takes longer
    seconds, begin = [], perf_counter()
    while len(seconds) < 3 or (
        len(seconds) < MOST_STEPS and perf_counter() - begin < PROBE_SECONDS
    ):
        seconds.append(seconds_of_a_step(engine, pictures, size))
    model.load(parameters, buffers)
    return 1e3 * median(seconds) / size
