"""benchmarks/scale.py on few clients."""

import json


def test_scale_with_a_thousand_clients(benchmark, monkeypatch, capsys):
    scale = benchmark("scale")
    words = ["--clients", "1000", "--rounds", "1", "--json", "model.name=lenet", "local.steps=1"]
    monkeypatch.setattr("sys.argv", ["scale.py", *words])
    monkeypatch.setitem(scale.datasets.LOADERS, "made", None)  # which main() sets anew
    scale.main()
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[2:6]] == ["100", "1,000", "100", "1,000"]
    found = json.loads(out[-1])
    assert found["seconds_100k_over_100"] > 0 and found["device"]
