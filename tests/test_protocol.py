"""The protocol of the plane: seeds, floors, distances and records."""
import math

import pytest
import torch

from nsgf_nb.bench.protocol import (
    Protocol,
    cached_floors,
    distances,
    distances_to_target,
    draw,
    measure,
    open_results,
    provenance,
    read_arrays,
    target_samples,
    to_json,
    w2_along_the_way,
    write_arrays,
)
from nsgf_nb.files import read_json, write_json
from nsgf_nb.metrics import w2
from nsgf_nb.nsgf import NSGF
from nsgf_nb.targets import TARGETS, sample_2d, source_2d

QUICK = Protocol(w2_points=64, w2_draws=2, sw2_points=200, sw2_draws=(2, 1), sample_steps=(2, 4),
                 floor_pairs=2)
FLOORS = {name: dict(mean=.5, se=.1, pairs=2, n=64) for name in ("w2", "sw2")}


class Target:
    "A perfect model: it draws from the target itself, whatever the number of steps."
    source = "normal"

    def sample(self, n, steps=None, seed=0, trajectory=False, x0=None):
        x = sample_2d("moons", n, seed)
        return x.expand(steps + 1, n, 2) if trajectory else x


@pytest.fixture(scope="module")
def trained():
    "A tiny model with a source of its own."
    model = NSGF(pool_size=128, minibatch=64, train_steps=2, batch_size=8, width=8, depth=1,
                 device="cpu")
    return model.fit(*target_samples("8gaussians-moons", 0), progress=False)


@pytest.mark.parametrize("wrong, words", (
    (dict(sw2_draws=(3,)), "sw2_draws.*sample_steps=.10, 100.*3"),
    (dict(w2_points=0), "w2_points.*at least 1.*0"),
    (dict(sample_steps=(10, 0)), "sample_steps.*0")))
def test_protocols_that_cannot_be_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Protocol(**wrong)


def test_floors_are_kept_for_one_protocol(tmp_path):
    first = cached_floors("moons", QUICK, tmp_path, progress=False)
    assert read_json(tmp_path/"floors-moons.json") == first
    write_json(tmp_path/"floors-moons.json", first | {"w2": first["w2"] | {"mean": 7.}})
    assert cached_floors("moons", QUICK, tmp_path)["w2"]["mean"] == 7.
    more = Protocol(**(vars(QUICK) | {"floor_pairs": 3}))
    again = cached_floors("moons", more, tmp_path, progress=False)
    assert again["w2"]["pairs"] == 3 and again["w2"]["mean"] != 7.
    assert read_json(tmp_path/"floors-moons.json") == again


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_sees_fresh_draws_or_a_fixed_set(target):
    data, source = target_samples(target, seed=4)
    stream = torch.Generator().manual_seed(3_000_004)
    assert torch.equal(data(5), sample_2d(target, 5, stream))
    assert torch.equal(target_samples(target, 4, fixed=30)[0], sample_2d(target, 30, 5_000_004))
    assert (source is not None) == (target == "8gaussians-moons")
    if source is not None:
        assert torch.equal(source(6), source_2d(target, 6, stream))


def test_the_stream_of_draws_can_be_restored():
    data, source = target_samples("8gaussians-moons", 0)
    state = source.get_state()
    first = data(3)
    data.set_state(state)
    assert torch.equal(data(3), first)


def test_samples_start_from_the_source_of_the_model(trained):
    states = draw("8gaussians-moons", trained, 9, seed=5, steps=3, trajectory=True)
    assert states.shape == (4, 9, 2)
    torch.testing.assert_close(states[0], source_2d("8gaussians-moons", 9, 5))
    assert torch.equal(draw("8gaussians-moons", trained, 9, 5, 3), states[-1])


def test_each_pair_has_seeds_of_its_own():
    seen = []

    def sample(n, seed):
        seen.append(seed)
        return sample_2d("moons", n, seed)

    values = distances_to_target("moons", w2, 32, 2, 100, sample)
    assert seen == [100, 102]
    assert values[1] == w2(sample_2d("moons", 32, 102), sample_2d("moons", 32, 103))


def test_one_value_has_no_standard_error():
    def sample(n, seed):
        return sample_2d("moons", n, seed)

    result = distances("moons", QUICK, sample, 1, FLOORS)
    assert result["sw2"]["se"] is None and result["sw2"]["ratio_se"] is None
    assert math.isclose(result["w2"]["mean"], sum(result["w2"]["values"])/2)
    assert math.isclose(result["w2"]["ratio"], result["w2"]["mean"]/.5)


def test_a_model_is_measured_at_each_number_of_steps():
    measured = measure("moons", Target(), QUICK, FLOORS, seed=3)
    assert {s: len(d["sw2"]["values"]) for s, d in measured.items()} == {"2": 2, "4": 1}
    assert measured["2"]["w2"] == measured["4"]["w2"]  # the same draws
    assert measured["2"] != measure("moons", Target(), QUICK, FLOORS, seed=4)["2"]


def test_w2_along_the_way_is_a_mean_over_draws():
    x, y = (sample_2d("moons", 64, seed) for seed in (2_000_000, 2_000_001))
    one = w2_along_the_way("moons", Target(), QUICK, draws=1, steps=3)
    assert one == [w2(x, y)]*4
    assert w2_along_the_way("moons", Target(), QUICK, draws=2, steps=3) != one


def test_results_are_extended_only_alike(tmp_path):
    path = tmp_path/"r.json"
    new = dict(protocol=to_json(QUICK), budget=dict(width=8), methods={})
    assert open_results(path, new) is new
    write_json(path, new | {"methods": {"NSGF": 1}})
    assert open_results(path, new)["methods"] == {"NSGF": 1}
    with pytest.raises(ValueError, match="r.json.*protocol"):
        open_results(path, new | {"protocol": to_json(Protocol())})
    with pytest.raises(ValueError, match="r.json.*budget"):
        open_results(path, new | {"budget": dict(width=9)})


def test_json_knows_neither_nan_nor_tuples():
    content = {"a": (1, [math.nan, .5]), "b": {"c": math.nan}}
    assert to_json(content) == {"a": [1, [None, .5]], "b": {"c": None}}
    assert to_json(Protocol())["sample_steps"] == [10, 100]


def test_arrays_come_back_to_half_precision(tmp_path):
    x = torch.randn(11, 4, 2, generator=torch.Generator().manual_seed(0))*5
    write_arrays(tmp_path/"paths.npz", {"2-RF": x})
    torch.testing.assert_close(read_arrays(tmp_path/"paths.npz")["2-RF"], x, rtol=1e-3, atol=1e-3)


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    made = provenance(torch.device("cpu"))
    assert made["commit"] is None and made["device"] == "cpu" and made["torch"]
