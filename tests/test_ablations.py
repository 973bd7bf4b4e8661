"""The studies: each runs at toy size and writes what its notebook reads; known cases come out."""
import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsgf_nb.bench import ablations
from nsgf_nb.bench.ablations import (
    QUICK,
    QUICK_PROTOCOL,
    STUDIES,
    AnnealedNSGF,
    Budget,
    ConstantStepNSGF,
    Lab,
    bias_and_spread,
    distance_from_straight,
    field_distance,
    matching_error,
    minibatch_velocities,
    missing_rows,
    population_velocity,
    read_study,
    study,
    time_grid,
)
from nsgf_nb.flow import integrate, particle_flow
from nsgf_nb.flow_matching import ot_partners
from nsgf_nb.nsgf import NSGF
from nsgf_nb.units import Standardizer

RESULTS = Path(__file__).resolve().parent.parent/"nbs"/"results"/"ablations"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablations")


def quick(name, folder, seeds=(0,), **options):
    return study(name, seeds, quick=True, out=folder, progress=False, **options)


def measured_by(monkeypatch, name, measure):
    "Replace how a study measures its rows."
    monkeypatch.setitem(STUDIES, name, replace(STUDIES[name], measure=measure))


# ---- every study

def check_trained(row):
    assert {"sw2", "seconds", "loss"} <= set(row)
    assert [int(steps) for steps in row["sw2"]] == row["config"]["sample_steps"]
    assert all(sw2["ratio"] > 0 for sw2 in row["sw2"].values())


def check_samples(row):
    if row["config"]["model"] == "the data":
        assert row["sw2"]["ratio"] > 0
    else:
        check_trained(row)


def check_bias(row):
    assert {"bias2", "spread", "size2"} < set(row) and row["spread"] > 0 and row["size2"] > 0


def check_matching(row):
    check_trained(row)
    assert row["held_out"] > row["error"]


def check_retiming(row):
    particles = row["config"]["model"] == "particles"
    assert len(row["distance"]) == (11 if particles else 6)


def check_grids(row):
    assert list(row["sw2"]) == ["2", "3", "5", "10"]
    assert len(row["sw2"]["5"]["values"]) == 1


CHECKS = dict(samples=check_samples, bias=check_bias, matching=check_matching,
              retiming=check_retiming, grids=check_grids)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_writes_what_the_notebook_reads(name, folder):
    result = quick(name, folder)
    assert result == read_study(folder, name)
    assert result["study"] == name and result["question"] == STUDIES[name].question
    assert result["command"] == f"nsgf bench ablations --studies {name} --quick"
    assert result["floors"]["sw2"]["mean"] > 0
    assert result["budget"]["quick"] and result["protocol"]["sw2_points"] == 200
    configs = [json.dumps(row["config"]) for row in result["rows"]]
    assert len(set(configs)) == len(configs) >= 2
    for row in result["rows"]:
        assert row["seed"] == 0 and row["provenance"]["torch"] == torch.__version__
        CHECKS.get(name, check_trained)(row)


def test_full_and_quick_studies_have_rows_of_the_same_kinds():
    def kinds(rows):
        return {(row.get("model"), *row, *row.get("settings", {})) for row in rows}
    for one in STUDIES.values():
        full = one.rows(Budget())
        assert kinds(full) == kinds(one.rows(QUICK)), one.name
        assert full == json.loads(json.dumps(full))


@pytest.mark.parametrize("name, key, values", (
    ("blur", "blur", [.02, .05, .1, .2, .5, 1.]),
    ("matching", "train_steps", [250*2**k for k in range(7)]),
    ("pool", "pool_size", [2**k for k in (13, 15, 17, 18, 19)]),
    ("minibatch", "minibatch", [16, 64, 256, 1024])))
def test_what_varies(name, key, values):
    assert [row["settings"] for row in STUDIES[name].rows(Budget())] == [{key: v} for v in values]


@pytest.mark.parametrize("name", STUDIES)
def test_the_published_results_are_complete(name):
    results = read_study(RESULTS, name)
    assert missing_rows(STUDIES[name], results, (0, 1, 2)) == []
    assert len(missing_rows(STUDIES[name], results, (3,))) == len(results["rows"])/3


# ---- resuming

def test_rows_that_exist_are_not_made_again(folder, monkeypatch):
    quick("blur", folder)
    before = (folder/"blur.json").read_bytes()
    measured_by(monkeypatch, "blur", None)  # nothing can be measured any more
    quick("blur", folder)
    assert (folder/"blur.json").read_bytes() == before
    made = []

    def record(lab, row, seed):
        made.append((row["settings"]["blur"], seed))
        return {}
    measured_by(monkeypatch, "blur", record)
    result = quick("blur", folder, seeds=(0, 1))
    assert made == [(.02, 1), (1., 1)]
    assert [row["seed"] for row in result["rows"]] == [0, 0, 1, 1]


def test_a_stopped_study_keeps_its_rows(tmp_path, folder, monkeypatch):
    floors = quick("blur", folder)["floors"]

    def stop_at_one(lab, row, seed):
        if row["settings"]["blur"] == 1.:
            raise KeyboardInterrupt
        return {}
    measured_by(monkeypatch, "blur", stop_at_one)
    with pytest.raises(KeyboardInterrupt):
        quick("blur", tmp_path, floors=floors)
    rows = read_study(tmp_path, "blur")["rows"]
    assert [row["config"]["settings"]["blur"] for row in rows] == [.02]
    assert not list(tmp_path.glob("floors*"))  # they were given


def test_a_model_is_trained_once(folder, monkeypatch):
    quick("retiming", folder)
    lab = Lab(QUICK, QUICK_PROTOCOL, None, folder, torch.device("cpu"))
    monkeypatch.setattr(NSGF, "fit", None)
    model, record = lab.train(dict(model="NSGF", settings=dict(blur=.02)), 0)
    assert isinstance(model, NSGF) and model.config.blur == .02
    assert record["seconds"]["training"] > 0
    with pytest.raises(TypeError):  # this one has no file, and cannot be trained
        lab.train(dict(model="NSGF", settings=dict(blur=.03)), 0)


def test_a_folder_of_another_budget(folder):
    floors = quick("blur", folder)["floors"]
    with pytest.raises(ValueError, match="blur.json was made with another"):
        study("blur", out=folder, floors=floors, progress=False)


@pytest.mark.parametrize("words, call", (
    ("studies must be among steps.*'blurs'", lambda: study("blurs")),
    ("kind must be one of uniform.*'log'", lambda: time_grid("log", 3)),
    ("steps .*1.*got 0", lambda: time_grid("uniform", 0)),
    (r"value .*\(0, 1\].*1.5", lambda: time_grid("geometric", 3, 1.5)),
    ("value .*0.*-1", lambda: time_grid("power", 3, -1)),
    ("at least 2 estimates", lambda: bias_and_spread(torch.zeros(2, 1, 3, 2),
                                                     torch.zeros(2, 3, 2))),
    ("at least 2 minibatches of 8", lambda: matching_error(None, torch.zeros(3, 8, 2), 8))),
    ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_calls(words, call):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_study_that_was_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="steps.json.*nsgf bench ablations --studies steps"):
        read_study(tmp_path, "steps")


def test_the_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    ablations.register(parser.add_subparsers())
    args = parser.parse_args(["ablations", "--studies", "bias", "--quick", "--seeds", "5",
                              "--out", str(tmp_path), "--device", "cpu"])
    args.call(args)
    assert {row["seed"] for row in read_study(tmp_path, "bias")["rows"]} == {5}
    assert f"wrote {tmp_path}/bias.json" in capsys.readouterr().out
    assert parser.parse_args(["ablations"]).studies == list(STUDIES)


# ---- the pools

def test_flows_of_constant_step_and_of_annealed_blur():
    data = torch.tensor([[3., 1.], [-3., -1.]]).repeat(20, 1)
    standardizer = Standardizer.of(data, "cpu")
    settings = dict(pool_size=64, minibatch=16, pool_steps=4, device="cpu")
    constant = ConstantStepNSGF(**settings, eta=.25)
    annealed = AnnealedNSGF(**settings, first_blur=.4, blur=.05)
    ours = NSGF(**settings).flow_settings(standardizer)
    assert constant.flow_settings(standardizer) == replace(ours, eta=.25)
    flow = annealed.flow_settings(standardizer)
    assert flow.eta == ours.eta == (1/4, 1/3, 1/2, 1)
    assert flow.blur == pytest.approx((.4, .2, .1, .05))
    in_data_units = AnnealedNSGF(**settings, first_blur=.4, blur=.05, blur_unit="data")
    scaled = [blur/standardizer.scale.item() for blur in flow.blur]
    assert in_data_units.flow_settings(standardizer).blur == pytest.approx(scaled)
    one_step = AnnealedNSGF(pool_steps=1, blur=.05, first_blur=.4)
    assert one_step.flow_settings(standardizer).blur == (.4,)
    for model in (constant, annealed):
        x, t, v = next(model.batches(data))
        assert x.shape == v.shape == (1024, 2)
        assert 0 <= t.min() and t.max() < 1


# ---- the minibatch bias

def test_bias_and_spread_of_known_laws():
    offset = torch.tensor([.3, -.1])
    noise = .5*torch.randn(2, 200_000, 2, generator=generator(1))
    v = offset + .7*torch.randn(2, 5, 200_000, 2, generator=generator())
    for shared in (0., 1.):  # do the minibatches have the noise of their large batch, or not?
        bias2, spread = bias_and_spread(v + shared*noise[:, None], noise)
        assert abs(bias2 - .1) < .005 and abs(spread - 2*.49) < .005
    assert abs(bias_and_spread(v - offset, noise)[0]) < .003


def test_a_minibatch_of_one_goes_to_its_only_target_point():
    points = torch.randn(128, 2, generator=generator())
    y = torch.tensor([1., -2.]) + .5*torch.randn(50, 2, generator=generator(1))
    v = minibatch_velocities(points, y, 1, 50, .3, generator(2))
    ends = v + points
    assert torch.cdist(ends.view(-1, 2), y).min(1).values.max() < 2e-3
    means = (y.mean(0) - points).expand(2, -1, -1)
    bias2, spread = bias_and_spread(v.view(2, 25, 128, 2), means + torch.tensor([.1, 0.]))
    assert abs(bias2 - .01) < 5e-3 and abs(spread - y.var(0, correction=0).sum()) < .02


def test_velocities_stay_with_their_points():
    points = (10.*torch.arange(8.).view(8, 1) + 100).repeat(1, 2)
    v = minibatch_velocities(points, torch.zeros(512, 2), 256, 2, .1, generator())
    assert ((v/-points).sub(1).abs() < .05).all()  # one point attracts all


def test_the_minibatch_bias_vanishes_against_the_population():
    points = torch.randn(16, 2, generator=generator())
    y = torch.randn(2000, 2, generator=generator(1)) + torch.tensor([1., 0.])
    limit = torch.stack([population_velocity(points, y, .7, seed) for seed in (0, 1)])
    torch.testing.assert_close(limit[0], torch.tensor([1., 0.]).expand(16, 2), atol=.15, rtol=0)
    numbers = []
    for n in (1, 8, 64):
        v = minibatch_velocities(points, y, n, 64, .7, generator(2)).view(2, 32, 16, 2)
        numbers.append(bias_and_spread(v, limit))
    (bias1, _), (bias8, spread8), (bias64, spread64) = numbers
    assert bias1 > 5*bias8 and abs(bias64) < .02
    assert spread8 > 4*spread64


# ---- the matching error

def test_matching_error_leaves_the_noise_out():
    x = torch.randn(6000, 2, generator=generator())
    step = -x + .8*torch.randn(6000, 2, generator=generator(1))
    states = torch.stack([x, x + step])
    error, loss = matching_error(lambda x, t: -x + .5, states, 1)
    assert abs(error - .5) < .08 and abs(loss - (.5 + 2*.64)) < .08
    assert abs(matching_error(lambda x, t: -x, states, 1)[0]) < .08


def test_matching_error_never_pairs_a_minibatch_with_itself():
    n = 50
    centres = torch.randn(60, 1, 2, generator=generator())
    x = centres + .01*torch.randn(60, n, 2, generator=generator(1))
    noise = torch.randn(60, 1, 2, generator=generator(2)).expand(60, n, 2)  # one for a minibatch
    states = torch.stack([x, x + noise]).flatten(1, 2)

    def zero(x, t):
        return 0*x
    assert abs(matching_error(zero, states, n, points=3000)[0]) < .7
    assert matching_error(zero, states, 1, points=3000)[0] > 1.5  # as if they were independent


# ---- the link to OT-CFM, and grids

def test_field_distance():
    x = torch.randn(50, 2, generator=generator())
    assert field_distance(lambda x, t: t*x, lambda x, t: t*x, x, .5) == 0
    assert math.isclose(field_distance(lambda x, t: 0*x, lambda x, t: x, x, .5), 1.)
    distance = field_distance(lambda x, t: 3*x, lambda x, t: t*x, x, 2.)
    assert math.isclose(distance, .25, rel_tol=1e-5)


def test_flows_of_small_blur_follow_the_retimed_straight_paths():
    x, y = torch.randn(2, 2, 64, 2, generator=generator())
    large, small = (max(distance_from_straight(x, y, blur)) for blur in (1., .02))
    assert small < .02 < .1 < large


def test_constant_eta_is_the_geometric_grid():
    x, y = torch.randn(2, 6, 2, generator=generator())*torch.tensor([1., 5.]).view(2, 1, 1)
    y = y[ot_partners(x, y)]
    times = time_grid("geometric", 7, .3)
    assert times == [1 - .7**k for k in range(8)]

    def to_partner(z, t):  # the field of OT-CFM on its own paths
        return (y - z)/(1 - t[:, None])
    end, _ = integrate(to_partner, x, times=times)
    torch.testing.assert_close(end, y + .7**7*(x - y))
    flow = particle_flow(x, y, .02, .3, 7, tol=1e-4)
    torch.testing.assert_close(flow[-1], end, atol=.02, rtol=0)


def test_grids():
    assert time_grid("uniform", 4) == time_grid("power", 4, 1) == [0, .25, .5, .75, 1]
    assert time_grid("power", 2, 2) == [0, .75, 1]
    assert time_grid("geometric", 3, .5) == [0, .5, .75, .875]
    assert time_grid("geometric, then 1", 3, .5) == [0, .5, .75, 1]
    assert time_grid("geometric", 2, 1) == [0, 1, 1]
