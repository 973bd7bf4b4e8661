"""The studies: every one runs at toy size and leaves what its notebook reads, and their arithmetic is right where the answer is known."""
import json
import math

import pytest
import torch

from nsgf_nb import ablations, matching
from nsgf_nb.ablations import STUDIES, bias_and_spread, field_distance, matching_error, on_grid, read_study, study, time_grid
from nsgf_nb.baselines import ot_partners
from nsgf_nb.flow import euler, particle_flow
from nsgf_nb.matching import NSGF


def generator(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("ablations")


def quick(name, folder, seeds=(0,), **more): return study(name, seeds, quick=True, out=folder, progress=False, **more)


# ---- every study

def of_one_model(row): return {"sw2", "seconds", "loss"} <= set(row) and all(row["sw2"][str(k)]["ratio"] > 0 for k in row["config"]["at"])

SHAPE = dict(  # what the notebook reads of a row
    samples=lambda r: r["sw2"]["ratio"] > 0 if r["config"]["kind"] == "the data" else of_one_model(r),
    bias=lambda r: all({"bias2", "spread", "size2"} == set(r[k]) and r[k]["spread"] > 0 for k in ("first", "end")),
    matching=lambda r: of_one_model(r) and r["held_out"] > r["error"],
    retiming=lambda r: len(r["distance"]) == (11 if r["config"]["kind"] == "particles" else 6),
    grids=lambda r: {"2", "3", "5", "10"} == set(r["sw2"]) and len(r["sw2"]["5"]["values"]) == 1)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_leaves_what_the_notebook_reads(name, folder):
    result = quick(name, folder)
    assert result == read_study(folder, name) and result["study"] == name and result["varies"] == STUDIES[name]
    assert result["command"] == f"nsgf bench ablations --studies {name} --quick"
    assert result["floors"]["sw2"]["mean"] > 0 and result["protocol"]["quick"]
    configs = [row["config"] for row in result["rows"]]
    assert len(configs) >= 2 and len({json.dumps(c) for c in configs}) == len(configs)
    for row in result["rows"]:
        assert row["seed"] == 0 and row["made_with"]["torch"] == torch.__version__
        assert SHAPE.get(name, of_one_model)(row), row


def test_what_is_there_is_not_made_again(folder, monkeypatch):
    quick("blur", folder)
    monkeypatch.setitem(ablations._NUMBERS, "blur", None)                       # nothing can be made any more
    before = (folder/"blur.json").read_bytes()
    quick("blur", folder)
    assert (folder/"blur.json").read_bytes() == before
    made = []
    monkeypatch.setitem(ablations._NUMBERS, "blur", lambda lab, config, seed: made.append((config["blur"], seed)) or {})
    result = quick("blur", folder, seeds=(0, 1))
    assert made == [(.02, 1), (1., 1)] and [r["seed"] for r in result["rows"]] == [0, 0, 1, 1]


def test_a_stopped_study_keeps_its_rows(tmp_path, folder, monkeypatch):
    def stop_at_one(lab, config, seed):
        if config["blur"] == 1.: raise KeyboardInterrupt
        return dict(told=config["blur"])
    monkeypatch.setitem(ablations._NUMBERS, "blur", stop_at_one)
    floors = quick("blur", folder)["floors"]
    with pytest.raises(KeyboardInterrupt): quick("blur", tmp_path, floors=floors)
    assert [r["told"] for r in read_study(tmp_path, "blur")["rows"]] == [.02]
    assert not list(tmp_path.glob("floors*"))                                   # they were given


def test_a_model_is_trained_once(folder, monkeypatch):
    quick("retiming", folder)
    lab = ablations._Lab(ablations._QUICK, folder, "cpu", None)
    monkeypatch.setattr(NSGF, "fit", None)
    model, made = lab.trained(dict(kind="NSGF", blur=.02), 0)
    assert isinstance(model, NSGF) and model.config.blur == .02 and made["seconds"]["training"] > 0
    with pytest.raises(TypeError): lab.trained(dict(kind="NSGF", blur=.03), 0)  # not there, and fit is not either


def test_wrong_calls_are_refused_by_name(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="studies must be among steps, .*, got 'blurs'"): study("blurs", out=tmp_path)
    with pytest.raises(FileNotFoundError, match="steps.json is not there: nsgf bench ablations --studies steps"): read_study(tmp_path, "steps")
    floors = quick("blur", folder)["floors"]
    with pytest.raises(ValueError, match="made by another protocol"): study("blur", out=folder, floors=floors, progress=False)
    with pytest.raises(ValueError, match="kind must be one of uniform, power, geometric"): time_grid("log", 3)
    with pytest.raises(ValueError, match="steps must be at least 1"): time_grid("uniform", 0)
    with pytest.raises(ValueError, match=r"value must be in \(0, 1\], got 1.5"): time_grid("geometric", 3, 1.5)
    with pytest.raises(ValueError, match="at least 2 estimates"): bias_and_spread(torch.zeros(2, 1, 3, 2), torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match="at least 2 minibatches of 8"): matching_error(None, torch.zeros(3, 8, 2), 8)


def test_full_and_quick_studies_ask_the_same_questions():
    full, small = ablations._Budget(), ablations._QUICK
    for name in STUDIES:
        kinds = [{(c.get("kind"), frozenset(c)) for c in ablations._configs(name, b)} for b in (full, small)]
        assert kinds[0] == kinds[1], name
        assert all(c == json.loads(json.dumps(c)) for c in ablations._configs(name, full))
    assert [c["blur"] for c in ablations._configs("blur", full)] == [.02, .05, .1, .2, .5, 1.]
    assert [c["n"] for c in ablations._configs("bias", full)] == 2*[16, 64, 256, 1024, 4096]
    assert [c["train_steps"] for c in ablations._configs("matching", full)] == [250*2**k for k in range(7)]
    assert [c["pool_size"] for c in ablations._configs("pool", full)] == [2**k for k in (13, 15, 17, 18, 19)]


# ---- the pools

def test_pools_of_constant_step_and_of_annealed_blur(monkeypatch):
    pools, build = [], matching._build_pool
    monkeypatch.setattr(matching, "_build_pool", lambda *args, **flow: pools.append(build(*args, **flow)) or pools[-1])
    settings, y = dict(pool_size=64, minibatch=16, flow_steps=4), torch.tensor([[3., 1.], [-3., -1.]])
    for model in (NSGF(**settings), ablations._Constant(**settings, eta=.25), ablations._Annealed(**settings, first_blur=.4, blur=.05)):
        x, t, v = next(model.batches(lambda n: y[torch.arange(n) % 2]))
        assert x.shape == v.shape == (1024, 2) and 0 <= t.min() and t.max() < 1
    ours, constant, annealed = (pool.flow for pool in pools)
    assert ours["blur"] == constant["blur"] == .05 and constant["eta"] == .25
    assert ours["eta"] == annealed["eta"] == [1/4, 1/3, 1/2, 1]
    torch.testing.assert_close(torch.tensor(annealed["blur"]), torch.tensor([.4, .2, .1, .05]))
    assert ablations._Annealed(flow_steps=1, blur=.05, first_blur=.4)._flow() == dict(blur=[.4])


def test_constant_step_goes_so_much_of_the_way():
    y = torch.tensor([[3., 1.]])
    way = particle_flow(torch.zeros(1, 2), y, .1, .25, 4)
    for k, x in enumerate(way): torch.testing.assert_close(x, (1 - .75**k)*y)


# ---- the minibatch bias

def test_bias_and_spread_of_known_laws():
    offset, noise = torch.tensor([.3, -.1]), .5*torch.randn(2, 200_000, 2, generator=generator(1))
    v = offset + .7*torch.randn(2, 5, 200_000, 2, generator=generator())
    for shared in (0., 1.):                                                     # the noise of a large batch is on its minibatches, or is not
        bias2, spread = bias_and_spread(v + shared*noise[:, None], noise)
        assert abs(bias2 - .1) < .005 and abs(spread - 2*.49) < .005
    assert abs(bias_and_spread(v - offset, noise)[0]) < .003                    # nothing is left of 5 estimates' own noise


def test_a_minibatch_of_one_has_its_own_pair():
    g, m, scale = generator(), torch.tensor([1., -2.]), .5
    x, fresh = torch.randn(128, 2, generator=g), torch.randn(50, 2, generator=g)
    v = []
    for _ in range(2):
        y = m + scale*torch.randn(50, 2, generator=g)
        first, end = ablations._visits(x, fresh, y, 1, 50, .3, g)
        torch.testing.assert_close(first, y[:, None] - x, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(end, y[:, None].expand(50, 128, 2), atol=2e-3, rtol=2e-3)
        v.append(first)
    bias2, spread = bias_and_spread(torch.stack(v), torch.stack([u.mean(0) for u in v]) + torch.tensor([.1, 0.]))
    assert abs(bias2 - .01) < 1e-4 and abs(spread - 2*scale**2) < .15


def test_points_of_a_visit_are_where_they_belong():
    x = (10.*torch.arange(8.).view(8, 1) + 100).repeat(1, 2)
    v, end = ablations._visits(x, torch.randn(512, 2, generator=generator()), torch.zeros(512, 2), 256, 2, .1, generator())
    torch.testing.assert_close(end, torch.zeros(2, 8, 2), atol=1, rtol=0)       # one point attracts all
    assert ((v/-x).sub(1).abs() < .05).all()                                    # each by its own way


def test_large_minibatches_lose_the_bias():
    g, errors = generator(), []
    x, fresh, y = torch.randn(16, 2, generator=g), torch.randn(2, 1024, 2, generator=g), torch.randn(2, 1024, 2, generator=g)
    for n in (1, 8, 64):                                                        # N(0, I) to itself: the true velocity is zero
        v = torch.stack([ablations._visits(x, a, b, n, 16, 1., g)[0] for a, b in zip(fresh, y)])
        errors.append(bias_and_spread(v, torch.zeros(2, 16, 2)))
    assert errors[0][0] > 5*errors[1][0] and errors[1][1] > 4*errors[2][1] and abs(errors[2][0]) < .03


# ---- the matching error

def test_matching_error_leaves_the_noise_out():
    x = torch.randn(6000, 2, generator=generator())
    step = -x + .8*torch.randn(6000, 2, generator=generator(1))
    states = torch.stack([x, x + step])
    error, loss = matching_error(lambda x, t: -x + .5, states, 1)
    assert abs(error - .5) < .08 and abs(loss - (.5 + 2*.64)) < .08
    assert abs(matching_error(lambda x, t: -x, states, 1)[0]) < .08


def test_matching_error_never_pairs_a_minibatch_with_itself():
    n, x = 50, torch.randn(60, 1, 2, generator=generator()).expand(60, 50, 2) + .01*torch.randn(60, 50, 2, generator=generator(1))
    noise = torch.randn(60, 1, 2, generator=generator(2)).expand(60, 50, 2)     # shared by the particles of a minibatch, which lie together
    states = torch.stack([x, x + noise]).flatten(1, 2)
    assert abs(matching_error(lambda x, t: 0*x, states, n, at=3000)[0]) < .7
    assert matching_error(lambda x, t: 0*x, states, 1, at=3000)[0] > 1.5        # as if they were independent


# ---- the link to OT-CFM, and grids

def test_field_distance():
    x = torch.randn(50, 2, generator=generator())
    assert field_distance(lambda x, t: t*x, lambda x, t: t*x, x, .5) == 0
    assert math.isclose(field_distance(lambda x, t: 0*x, lambda x, t: x, x, .5), 1.)
    assert math.isclose(field_distance(lambda x, t: 3*x, lambda x, t: t*x, x, 2.), .25, rel_tol=1e-5)


def test_particles_of_small_blur_follow_the_retimed_straight_paths(folder):
    lab = ablations._Lab(ablations._QUICK, folder, "cpu", None)
    large, small = (max(ablations._particles(lab, blur, 0, n=64, flows=2)) for blur in (1., .02))
    assert small < .02 < .1 < large


def test_constant_eta_is_the_geometric_grid():
    g = generator()
    x, y = torch.randn(6, 2, generator=g), 5*torch.randn(6, 2, generator=g)
    y = y[ot_partners(x, y)]
    times = time_grid("geometric", 7, .3)
    assert times == [1 - .7**k for k in range(8)]
    found = on_grid(lambda z, t: (y - z)/(1 - t), x, times)                     # the field of OT-CFM on its own paths
    torch.testing.assert_close(found, x + times[-1]*(y - x))
    torch.testing.assert_close(found, y + .7**7*(x - y))
    torch.testing.assert_close(particle_flow(x, y, .02, .3, 7, tol=1e-4)[-1], found, atol=.02, rtol=0)


def test_grids():
    assert time_grid("uniform", 4) == time_grid("power", 4, 1) == [0, .25, .5, .75, 1]
    assert time_grid("power", 2, 2) == [0, .75, 1] and time_grid("geometric, then 1", 3, .5) == [0, .5, .75, 1]
    assert time_grid("geometric", 3, .5) == [0, .5, .75, .875] and time_grid("geometric", 2, 1) == [0, 1, 1]
    v, x = lambda x, t: x.cos() + t, torch.randn(9, 2, generator=generator())
    torch.testing.assert_close(on_grid(v, x, time_grid("uniform", 6)), euler(lambda x, t: v(x, t[:, None]), x, 6))
