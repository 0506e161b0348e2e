"""Flower (Beutel et al. 2020, arXiv 2007.14390) on the task of rivals.py, with Ray.

    PYTHON benchmarks/flower_rival.py TASK.npz ROUNDS PRECISION STYLE WEIGHTS.npy WORKERS THREADS

Set up like its PyTorch quickstart: a ServerApp with FedAvg, a ClientApp that trains, client
resources so that WORKERS clients train at a time, on one GPU if there is one; no evaluation. Beyond
the quickstart, a worker loads pictures and builds the network once. WEIGHTS.npy gets the final
model, float32 [num_parameters]. The last line printed is JSON: `seconds` of each round, from the
end of the round before.
"""

import json
import os
import sys
import time

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from rival_task import load_task
from torch.nn.functional import cross_entropy


def make_client(file: str, precision: str, style: str, threads: int) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(threads)
        task = load_task(file, style)
        network = task.network.train()
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(network.parameters(), lr=task.lr)
        images, labels = task.clients[context.node_config["partition-id"]]
        batches = zip(images.split(task.batch_size), labels.split(task.batch_size), strict=True)
        for batch, targets in batches:
            optimizer.zero_grad()
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = cross_entropy(network(batch), targets)
            loss.backward()
            optimizer.step()
        arrays = ArrayRecord(network.state_dict())
        metrics = MetricRecord({"num-examples": len(labels)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def make_server(file: str, style: str, rounds: int, weights: str, times: list[float]) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        task = load_task(file, style)
        strategy = FedAvg(
            fraction_train=task.cohort / len(task.clients),
            fraction_evaluate=0.0,
            min_train_nodes=task.cohort,
            min_available_nodes=len(task.clients),
        )
        arrays = ArrayRecord(task.network.state_dict())

        def look_at_clock(server_round: int, arrays: ArrayRecord) -> None:
            times.append(time.perf_counter())

        result = strategy.start(grid, arrays, rounds, evaluate_fn=look_at_clock)
        final = [array.numpy().ravel() for array in result.arrays.values()]
        np.save(weights, np.concatenate(final))

    return app


def main() -> None:
    file, rounds, precision, style, weights = sys.argv[1], int(sys.argv[2]), *sys.argv[3:6]
    workers, threads = map(int, sys.argv[6:])
    num_gpus = min(1, torch.cuda.device_count())
    times: list[float] = []  # before the first round, and after each
    run_simulation(
        make_server(file, style, rounds, weights, times),
        make_client(file, precision, style, threads),
        num_supernodes=len(load_task(file, style).clients),
        backend_config={
            "init_args": {"num_cpus": workers * threads, "num_gpus": num_gpus},
            "client_resources": {"num_cpus": threads, "num_gpus": num_gpus / workers},
        },
    )
    print(json.dumps({"seconds": np.diff(times).tolist()}))


if __name__ == "__main__":
    main()
