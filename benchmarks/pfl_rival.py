"""pfl-research (Granqvist et al. 2024, arXiv 2404.06430) on the task of rivals.py.

    PYTHON benchmarks/pfl_rival.py TASK.npz ROUNDS PRECISION STYLE WEIGHTS.npy

Set up like its own CIFAR-10 benchmark: SimulatedBackend, FederatedAveraging, users in memory as
Dataset (what its guide calls fastest), on the device of training, no evaluation. Its guide starts
several processes by torchrun. WEIGHTS.npy gets the final model, float32 [num_parameters]. The last
line printed is JSON: `seconds` of each round, from the end of the round before.
"""

import json
import os
import sys
import time

import numpy as np
import torch

if torch.cuda.device_count() == 1 and "LOCAL_RANK" in os.environ:
    # Several processes share the GPU: pfl-research would look for a GPU for each of them, and NCCL
    # refuses two processes on one. gloo adds the updates up on the CPU.
    os.environ["LOCAL_RANK"] = "0"
    start = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend: start("gloo")

from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from rival_task import load_task, save_weights
from torch.nn.functional import cross_entropy

NEVER = 10**9


class Clock(TrainingProcessCallback):
    """When training began and when each round ended."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    file, rounds, precision, style, weights = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    np.random.seed(1)  # the same in every process: they draw the cohort together
    torch.manual_seed(1)
    task = load_task(file, style)
    network = task.network
    network.loss = lambda images, labels: cross_entropy(network.train()(images), labels)
    network.metrics = lambda images, labels: {"loss": Weighted(0, 1)}  # asked for in round 1
    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        amp_dtype=torch.bfloat16 if precision == "bf16" else None,
    )
    users = dict(enumerate(task.clients))
    sampler = get_user_sampler("minimize_reuse", list(users))
    backend = SimulatedBackend(FederatedDataset.from_slices(users, sampler), None, [WeightByUser()])
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=NEVER,
            train_cohort_size=task.cohort,
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_learning_rate=task.lr, local_num_epochs=1, local_batch_size=task.batch_size
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    if distributed.global_rank == 0:
        save_weights(network, weights)
        print(json.dumps({"seconds": np.diff(clock.times).tolist()}))


if __name__ == "__main__":
    main()
