"""The baselines: targets that agree with torchcfm's, couplings that are optimal, reflows that straighten, and what every model promises."""
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from nsgf_nb.baselines import OTCFM, RectifiedFlow, RectifiedFlowConfig, SI, ot_partners
from nsgf_nb.data import sample_2d, source_2d
from nsgf_nb.flow import integrate
from nsgf_nb.matching import fit
from nsgf_nb.metrics import sw2
from nsgf_nb.models import MLP
from nsgf_nb.nsgfpp import StraightFlow

TINY = dict(train_steps=30, batch_size=64, width=16, depth=1, steps=4, device="cpu")
MODELS = {
    "FM": lambda **kw: StraightFlow(**TINY | kw), "SI": lambda **kw: SI(**TINY | kw),
    "OT-CFM": lambda **kw: OTCFM(**TINY | dict(pool_size=256, minibatch=32) | kw), "OT-CFM, fresh": lambda **kw: OTCFM(**TINY | dict(fresh=True, minibatch=32) | kw),
    "rectified": lambda **kw: RectifiedFlow(**TINY | dict(pool_size=256, reflows=2, ode_steps=3) | kw)}
each = pytest.mark.parametrize("name", MODELS)
moons = sample_2d("moons", 2000)


def pairs(seed=0, n=64, d=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), 2*torch.randn(n, d, generator=g) + 1, torch.rand(n, generator=g)


# ---- parity

@pytest.fixture
def torchcfm(): return pytest.importorskip("torchcfm.conditional_flow_matching", reason="torchcfm is not installed: pip install nsgf_nb[bench]")


@pytest.mark.parametrize("d", (1, 2, 5))
def test_straight_targets_are_those_of_torchcfm(torchcfm, d):
    x, y, t = pairs(d=d)
    _, theirs, velocity = torchcfm.ConditionalFlowMatcher(sigma=0.).sample_location_and_conditional_flow(x, y, t=t)
    torch.testing.assert_close(StraightFlow._path(x, y, t), (theirs, velocity))


@pytest.mark.parametrize("d", (1, 2, 5))
def test_interpolant_targets_are_those_of_torchcfm(torchcfm, d):
    x, y, t = pairs(d=d)
    _, theirs, velocity = torchcfm.VariancePreservingConditionalFlowMatcher(sigma=0.).sample_location_and_conditional_flow(x, y, t=t)
    torch.testing.assert_close(SI._path(x, y, t), (theirs, velocity))


@pytest.mark.parametrize("seed", range(3))
def test_couplings_are_those_of_torchcfm(torchcfm, seed):
    from torchcfm.optimal_transport import OTPlanSampler
    x, y, _ = pairs(seed)
    theirs = torch.as_tensor(OTPlanSampler(method="exact").get_map(x, y)).argmax(1)
    assert (ot_partners(x, y) == theirs).all()


def test_ot_cfm_batches_have_the_law_of_torchcfm(torchcfm):
    "The same pairs of points in the same minibatch: states and targets agree as sets, whatever the order."
    x, y, t = pairs(n=128)
    np.random.seed(0)
    x0, x1 = torchcfm.OTPlanSampler(method="exact").sample_plan(x, y, replace=False)
    mine = torch.cat([x, y[ot_partners(x, y)]], 1)
    theirs = torch.cat([x0, x1], 1)
    order = lambda u: u[u[:, 0].argsort()]
    torch.testing.assert_close(order(mine), order(theirs))


# ---- couplings

@pytest.mark.parametrize("n", (1, 2, 7, 100))
def test_partners_are_a_permutation_no_dearer_than_any_tried(n):
    x, y, _ = pairs(n=n)
    j, price = ot_partners(x, y), lambda i: (x - y[i]).square().sum().item()
    assert sorted(j.tolist()) == list(range(n))
    orders = itertools.permutations(range(n)) if n < 8 else (torch.randperm(n, generator=torch.Generator().manual_seed(s)) for s in range(200))
    assert price(j) <= min(price(torch.as_tensor(i)) for i in orders) + 1e-5


def test_partners_far_from_the_origin():
    x, y, _ = pairs()
    assert (ot_partners(x + 1e4, y + 1e4) == ot_partners(x.double() + 1e4, y.double() + 1e4)).float().mean() > .9


def test_partners_of_images():
    x, y = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
    assert (ot_partners(x, y) == ot_partners(x.flatten(1), y.flatten(1))).all()


def test_partners_of_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match=r"x and y must be of one shape, got \(3, 2\) and \(4, 2\)"): ot_partners(torch.zeros(3, 2), torch.zeros(4, 2))


def test_pool_of_pairs_couples_within_minibatches_and_deals_from_all():
    model = OTCFM(**TINY | dict(pool_size=250, minibatch=64))
    batches = model.batches(moons)
    assert len(batches.draw.__closure__) and model.seconds["pairs"] > 0
    seen = set()
    for _ in range(40):
        x, t, v = next(batches)
        seen |= {tuple(p) for p in ((x - t[:, None]*v)*1e3).round().int().tolist()}                # the source end of each pair
    assert 4*64*.95 < len(seen) <= 4*64*1.05                                                      # all of four minibatches; rounding may tear a few apart


def test_fresh_couplings_do_not_repeat():
    batches = OTCFM(**TINY | dict(fresh=True, minibatch=64)).batches(moons)
    a, b = next(batches), next(batches)
    assert not (a[0] == b[0]).all(1).any()


# ---- paths

def test_a_quarter_turn_has_both_ends_and_keeps_the_variance():
    x, y, _ = pairs(n=20_000)
    for t, end in ((0., x), (1., y)): torch.testing.assert_close(SI._path(x, y, torch.full((len(x),), t))[0], end, atol=1e-5, rtol=0)
    y = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(5))
    for t in (.3, .5, .8): assert abs(SI._path(x, y, torch.full((len(x),), t))[0].var() - 1) < .03


@pytest.mark.parametrize("path", (SI._path, StraightFlow._path))
def test_targets_are_the_derivative_of_the_path(path):
    x, y, t = (u.double() for u in pairs(d=3))
    h = 1e-6
    torch.testing.assert_close((path(x, y, t + h)[0] - path(x, y, t - h)[0])/(2*h), path(x, y, t)[1], atol=1e-7, rtol=0)


# ---- rectified flow

def test_a_reflow_learns_from_the_ends_of_its_teacher():
    teacher = StraightFlow(**TINY).fit(moons, progress=False)
    model = RectifiedFlow(**TINY | dict(pool_size=512, reflows=1, ode_steps=4))
    model.teacher = teacher
    x, t, v = next(model.batches(moons))
    start = x - t[:, None]*v
    end, _ = integrate(teacher.net, start, 0., 4, "heun")
    torch.testing.assert_close(start + v, end, atol=1e-4, rtol=1e-4)


def test_a_reflow_starts_from_the_weights_of_its_teacher_and_leaves_them_alone():
    teacher = StraightFlow(**TINY).fit(moons, progress=False)
    before = {k: v.clone() for k, v in teacher.net.state_dict().items()}
    model = RectifiedFlow(**TINY | dict(pool_size=256, reflows=1, lr=1e-12)).fit(moons, progress=False, teacher=teacher)
    for k, v in model.net.state_dict().items(): torch.testing.assert_close(v, before[k], atol=1e-5, rtol=0)
    assert all((v == before[k]).all() for k, v in teacher.net.state_dict().items())


def test_reflows_chain_down_to_flow_matching():
    model = MODELS["rectified"]().fit(moons, progress=False)
    assert type(model.teacher) is RectifiedFlow and model.teacher.config == dataclasses.replace(model.config, reflows=1)
    fm = model.teacher.teacher
    assert type(fm) is StraightFlow and fm.config.coupling == "independent"
    alone = StraightFlow(**TINY).fit(moons, progress=False)
    assert all((v == alone.net.state_dict()[k]).all() for k, v in fm.net.state_dict().items())        # 1-RF is FM


def test_reflow_straightens_and_keeps_the_end():
    settings = dict(train_steps=800, batch_size=256, width=48, depth=2, steps=20, device="cpu")
    fm = StraightFlow(**settings).fit(moons, progress=False)
    rf = RectifiedFlow(**settings, pool_size=2**14).fit(moons, progress=False, teacher=fm)
    def bend(m):
        v = m.sample(500, trajectory=True).diff(dim=0)
        return ((v - v.mean(0)).square().sum()/v.square().sum()).item()
    assert bend(rf) < .4*bend(fm)
    y = sample_2d("moons", 4000, 9)
    assert sw2(rf.sample(4000, 2), y) < .6*sw2(fm.sample(4000, 2), y) and sw2(rf.sample(4000), y) < 1.5*sw2(fm.sample(4000), y) + .05


def test_a_teacher_without_a_network_is_refused():
    with pytest.raises(RuntimeError, match="no network yet"): RectifiedFlow(**TINY, pool_size=64).fit(moons, progress=False, teacher=StraightFlow(**TINY))


# ---- what every model promises

@each
def test_same_seed_same_weights_and_torchs_generator_untouched(name):
    state = torch.get_rng_state()
    a, b, c = (MODELS[name](seed=s).fit(moons, progress=False) for s in (3, 3, 4))
    assert (torch.get_rng_state() == state).all()
    same = lambda m: all((v == m.net.state_dict()[k]).all() for k, v in a.net.state_dict().items())
    assert same(b) and not same(c)


@each
def test_file_and_back(name, tmp_path):
    model = MODELS[name]().fit(moons, progress=False)
    model.save(tmp_path/"m.safetensors")
    again = type(model).load(tmp_path/"m.safetensors", "cpu")
    assert again.config == model.config and (again.sample(20, seed=5) == model.sample(20, seed=5)).all()
    with pytest.raises(ValueError, match="holds a model of type"): (SI if type(model) is not SI else OTCFM).load(tmp_path/"m.safetensors")


@each
def test_resumed_training_ends_in_the_same_weights(name, tmp_path, monkeypatch):
    whole = MODELS[name]().fit(moons, progress=False)
    import nsgf_nb.matching as matching
    step, calls = matching._Run.step, []
    def stops(run):
        calls.append(1)
        if len(calls) == stop: raise KeyboardInterrupt
        step(run)
    monkeypatch.setattr(matching._Run, "step", stops)
    monkeypatch.setattr(matching.time, "perf_counter", lambda c=itertools.count(): 100.*next(c))       # a checkpoint after every step
    stop = 20 + (60 if name == "rectified" else 0)                                                    # in the last round
    with pytest.raises(KeyboardInterrupt): MODELS[name]().fit(moons, progress=False, checkpoint=tmp_path/"c")
    resumed = MODELS[name]().fit(moons, progress=False, checkpoint=tmp_path/"c")
    assert all((v == resumed.net.state_dict()[k]).all() for k, v in whole.net.state_dict().items())


@each
def test_a_source_of_its_own(name):
    g = torch.Generator().manual_seed(0)
    model = MODELS[name]().fit(moons, lambda n: source_2d("8gaussians-moons", n, g), progress=False)
    assert model.source == "given" and model.sample(10).shape == (10, 2)


@each
def test_batches_train_a_network_of_ones_own(name):
    model = MODELS[name]()
    if name == "rectified": model.teacher = StraightFlow(**TINY).fit(moons, progress=False)
    found = fit(MLP((2,), 16, 1), model.batches(moons), 10, progress=False)
    assert len(found.losses) == 10 and found.losses.isfinite().all()


@each
def test_images_too(name):
    x = torch.rand(64, 1, 4, 4)*2 - 1
    assert MODELS[name]().fit(x, progress=False).sample(3).shape == (3, 1, 4, 4)


@pytest.mark.parametrize("kind, bad, words", (
    (SI, dict(steps=0), "steps must be at least 1"), (OTCFM, dict(minibatch=0), "minibatch must be at least 1"), (OTCFM, dict(pool_size=0), "pool_size must be at least 1"), (OTCFM, dict(fresh=1), "fresh must be of type bool"),
    (RectifiedFlow, dict(reflows=0), "reflows must be at least 1"), (RectifiedFlow, dict(ode_steps=0), "ode_steps must be at least 1"), (RectifiedFlow, dict(pool_size=0), "pool_size must be at least 1")))
def test_settings_that_make_no_sense(kind, bad, words):
    with pytest.raises((ValueError, TypeError), match=words): kind(**bad)


def test_settings_of_another_model():
    with pytest.raises(TypeError, match="must be a RectifiedFlowConfig"): RectifiedFlow(SI.Config())
    with pytest.raises(TypeError, match="'coupling' is no setting of SI"): SI(coupling="ot")
    assert RectifiedFlowConfig().pool_size == 2**18
