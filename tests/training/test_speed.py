"""speed.py: how long this machine trains on an example, and that nothing else comes of it."""

import pytest
import torch
from helpers.noise import PICTURES, flat_model
from helpers.runs import killed_before_logging, make_federation, rounds, summary

from config import ConfigError, Local
from federation import federation
from training import speed


def test_it_is_the_median_of_steps_and_leaves_the_model_as_it_was(monkeypatch):
    model, times = flat_model(), iter([9.0, 0.4, 0.2, 0.3])
    before = model.read_parameters().clone(), model.read_buffers().clone()
    one_step = speed.seconds_of_a_step

    def step(engine, pictures, size):
        one_step(engine, pictures, size)
        model.parameters.add_(1.0)
        return next(times)

    monkeypatch.setattr(speed, "seconds_of_a_step", step)
    monkeypatch.setattr(speed, "PROBE_SECONDS", 0.0)
    local = Local(batch_size=4)
    assert speed.probe_speed(model, PICTURES, local) == pytest.approx(300 / 4)  # not the first one
    assert torch.equal(model.read_parameters(), before[0])
    assert torch.equal(model.read_buffers(), before[1])


AUTO = ["network.ms_per_example=auto", "model.name=resnet18", "model.width=0.0625"]


def test_a_device_is_a_multiple_of_this_machine_and_the_model_stays_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(federation, "probe_speed", lambda *_: 8.0)
    one = make_federation(tmp_path, *AUTO, "network.devices={laptop: 1.0}")
    two = make_federation(tmp_path, *AUTO, "network.ms_per_example=8", name="given")
    ratio = one.clock.population.ms_per_example / 8.0
    assert 0.25 * 0.3 < ratio.min() < ratio.max() < 0.25 * 3  # a laptop is four times as fast
    assert two.clock.population.ms_per_example.tolist() == [8.0] * 4
    for some in (one, two):
        some.run_round()
    assert one.server.sha256() == two.server.sha256()


def test_a_resumed_run_goes_on_with_what_it_measured_first(run, monkeypatch):
    measured = iter([2.0, 2.0, 3.0])
    monkeypatch.setattr(federation, "probe_speed", lambda *_: next(measured))
    _, whole = run(*AUTO, name="whole")
    killed = killed_before_logging(run, monkeypatch, 4, *AUTO)
    assert summary(killed)["simulated_seconds"] == summary(whole)["simulated_seconds"]
    assert len(rounds(killed)) == len(rounds(whole)) and next(measured) == 3.0


@pytest.mark.parametrize("value", ["Auto", "fast", "null"])
def test_only_auto_stands_for_a_number(tmp_path, value):
    with pytest.raises(ConfigError, match="takes a number, such as 0.1, or auto, not"):
        make_federation(tmp_path, f"network.ms_per_example={value}")


def test_a_file_of_clients_says_how_fast_they_are(tmp_path):
    with pytest.raises(ConfigError, match="network.ms_per_example: clients_file says this already"):
        make_federation(tmp_path, *AUTO, "network.clients_file=clients.csv")
