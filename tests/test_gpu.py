"""On a CUDA device: a run ends, and a second one ends the same. `make gpu-check` runs this."""

import pytest
import torch
from helpers.runs import summary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_gpu(run, precision):
    settings = ["device=cuda", f"precision={precision}", "model.name=resnet18", "model.width=0.25"]
    status, folder = run(*settings)
    assert status == 0
    result = summary(folder)
    assert 0 <= result["test_accuracy"] <= 1
    assert result["dense_bytes_up"] > 10 * result["bytes_up"]
