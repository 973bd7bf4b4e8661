"""`nsgf bench tables`: what it writes, what it adds to results that exist, and how it measures."""
import json

import numpy
import pytest
import torch

from nsgf_nb.bench.table_bench import (
    METHODS,
    _areas,
    _moment_errors,
    read_table_results,
)

OURS = {"NSGF", "nsgf fit", "OT-CFM", "FM", "KDE", "GMM", "rows again"}


def test_what_is_missing_is_added(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    quick = ("nsgf", "bench", "tables", "--quick", "--data", "iris", "--out", "out")
    code, out, err = command(*quick)
    assert code == 0, err
    path = tmp_path/"out"/"iris.json"
    first = json.loads(path.read_text())
    assert OURS <= first["methods"].keys() <= METHODS.keys()
    assert first["shape"] == [150, 4] and first["steps"] == 20
    for method in ("NSGF", "nsgf fit"):
        entry = first["methods"][method]
        assert entry["steps"] == 20 and "commit" in entry["provenance"]
        assert 0 <= entry["deviations"]["mean"] and .5 <= entry["gb"]["mean"] <= 1
    assert "log_prob" in first["methods"]["NSGF"]
    del first["methods"]["FM"]
    path.write_text(json.dumps(first))
    code, out, _ = command(*quick)
    assert code == 0 and "iris FM {" in out and "iris NSGF {" not in out
    second = read_table_results(tmp_path/"out")["iris"]
    assert OURS <= second["methods"].keys()
    assert second["methods"]["GMM"] == first["methods"]["GMM"]


def test_moments_of_known_samples():
    rng = numpy.random.default_rng(0)
    train = rng.normal(size=(4000, 2))
    train[:, 1] += train[:, 0]
    errors = _moment_errors(numpy.concatenate([1.2*train[:, :1], train[:, 1:]], 1), train)
    assert errors["deviations"] == pytest.approx(.2) and errors["correlations"] < 1e-9
    errors = _moment_errors(rng.permuted(train, axis=0), train)
    assert errors["correlations"] == pytest.approx(.707, abs=.05)
    assert errors["constant"] and errors["deviations"] < 1e-9


def test_areas_of_equal_and_of_unequal_rows():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(600, 2, generator=generator).numpy() for _ in range(2))
    assert max(_areas(x, y, 0).values()) < .56
    shifted = _areas(x, y + 3, 0)
    assert min(shifted.values()) > .95
    assert numpy.isnan(_areas(x[:5], y[:5], 0)["gb"])
