"""Flow matching: targets as torchcfm's, couplings that are optimal, reflows that straighten."""
import itertools

import numpy as np
import ot
import pytest
import torch
from torch.testing import assert_close

from nsgf_nb.flow import integrate
from nsgf_nb.flow_matching import (
    PATHS,
    FlowMatching,
    FlowMatchingConfig,
    entropic_partners,
    ot_partners,
    reflow,
    straight_path,
    trigonometric_path,
)
from nsgf_nb.metrics import sw2
from nsgf_nb.mlp import MLP
from nsgf_nb.nsgf import NSGF
from nsgf_nb.sinkhorn import cost
from nsgf_nb.targets import sample_2d, source_2d
from nsgf_nb.training import Loop, Trainer

TINY = dict(train_steps=30, batch_size=64, width=16, depth=1, sample_steps=4, device="cpu")
KINDS = {
    "FM": dict(),
    "SI": dict(path="trigonometric"),
    "OT-CFM": dict(coupling="ot", pool_size=256, minibatch=32),
    "OT-CFM, fresh": dict(coupling="ot", minibatch=32),
    "entropic": dict(coupling="entropic"),
    "reflow": dict(coupling="reflow", pool_size=256, ode_steps=3),
}
each = pytest.mark.parametrize("kind", KINDS)
moons = sample_2d("moons", 2000)


def points(seed=0, n=64, d=2):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    y = 2*torch.randn(n, d, generator=g) + 1
    return x, y, torch.rand(n, generator=g)


@pytest.fixture(scope="module")
def teacher():
    return FlowMatching(**TINY).fit(moons, progress=False)


def fitted(kind, teacher, data=moons, source=None, **settings):
    teacher = teacher if kind == "reflow" else None
    model = FlowMatching(**{**TINY, **KINDS[kind], **settings})
    return model.fit(data, source, progress=False, teacher=teacher)


def same(a, b):
    weights = b.net.state_dict()
    return all(torch.equal(w, weights[name]) for name, w in a.net.state_dict().items())


# ---- paths

@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_paths_join_their_ends_and_velocities_are_their_derivatives(path):
    x, y, t = (u.double() for u in points(d=3))
    assert_close(path(x, y, torch.zeros_like(t))[0], x)
    assert_close(path(x, y, torch.ones_like(t))[0], y)
    h = 1e-6
    difference = (path(x, y, t + h)[0] - path(x, y, t - h)[0])/(2*h)
    assert_close(difference, path(x, y, t)[1], atol=1e-7, rtol=0)


def test_a_quarter_turn_keeps_the_variance():
    x, _, _ = points(n=20_000)
    y = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(5))
    for t in (.3, .5, .8):
        x_t, _ = trigonometric_path(x, y, torch.full((len(x),), t))
        assert abs(x_t.var() - 1) < .03


# ---- parity with torchcfm

@pytest.fixture
def torchcfm():
    return pytest.importorskip("torchcfm.conditional_flow_matching",
                               reason="torchcfm is not installed: pip install .[bench]")


@pytest.mark.parametrize("matcher, path", (
    ("ConditionalFlowMatcher", straight_path),
    ("VariancePreservingConditionalFlowMatcher", trigonometric_path),
))
@pytest.mark.parametrize("d", (1, 5))
def test_targets_are_those_of_torchcfm(torchcfm, matcher, path, d):
    x, y, t = points(d=d)
    theirs = getattr(torchcfm, matcher)(sigma=0.)
    _, x_t, velocity = theirs.sample_location_and_conditional_flow(x, y, t=t)
    assert_close(path(x, y, t), (x_t, velocity))


def test_couplings_are_those_of_torchcfm(torchcfm):
    x, y, _ = points(n=128)
    np.random.seed(0)
    x0, x1 = torchcfm.OTPlanSampler(method="exact").sample_plan(x, y, replace=False)
    mine = torch.cat([x, y[ot_partners(x, y)]], 1)
    theirs = torch.cat([x0, x1], 1)
    assert_close(mine[mine[:, 0].argsort()], theirs[theirs[:, 0].argsort()])


# ---- couplings

@pytest.mark.parametrize("n", (1, 2, 7, 100))
def test_exact_partners_are_the_cheapest_permutation(n):
    x, y, _ = points(n=n)
    g = torch.Generator().manual_seed(0)

    def price(order):
        return (x - y[order]).square().sum().item()
    partners = ot_partners(x, y)
    assert sorted(partners.tolist()) == list(range(n))
    if n < 8:
        others = [torch.tensor(order) for order in itertools.permutations(range(n))]
    else:
        others = [torch.randperm(n, generator=g) for _ in range(200)]
    assert price(partners) <= min(price(order) for order in others) + 1e-5


def test_exact_partners_far_from_the_origin():
    x, y, _ = points()
    exact = ot_partners(x.double() + 1e4, y.double() + 1e4)
    assert (ot_partners(x + 1e4, y + 1e4) == exact).float().mean() > .9


def test_unequal_numbers_have_no_exact_partners():
    with pytest.raises(ValueError, match=r"x and y.*\(3, 2\).*\(4, 2\)"):
        ot_partners(torch.zeros(3, 2), torch.zeros(4, 2))


def test_entropic_partners_are_drawn_from_the_plan():
    x, y, _ = points(n=16, d=3)
    draws = torch.stack([entropic_partners(x, y, 1., torch.Generator().manual_seed(s))
                         for s in range(400)])
    frequency = torch.stack([(draws == j).double().mean(0) for j in range(16)], 1)
    plan = ot.sinkhorn([], [], cost(x, y).double().numpy(), 1., stopThr=1e-9, numItermax=5000)
    assert (frequency - 16*torch.as_tensor(plan)).abs().max() < .1  # four standard errors


def test_entropic_partners_are_nearly_as_cheap_as_exact_ones():
    x, y, _ = points(n=64, d=20)
    generator = torch.Generator().manual_seed(0)

    def price(partners):
        return (x - y[partners]).square().sum(1).mean().item()
    exact = price(ot_partners(x, y))
    at_random = price(torch.randperm(64, generator=generator))
    assert price(entropic_partners(x, y, .5, generator)) < exact + .2*(at_random - exact)


def starts(batches, count):
    "The source ends of the pairs of `count` batches, rounded."
    rows = set()
    for _ in range(count):
        x, t, v = next(batches)
        rows |= {tuple(row) for row in ((x - t[:, None]*v)*1e3).round().int().tolist()}
    return rows


def test_a_pool_of_pairs_is_made_once_and_dealt_from():
    model = FlowMatching(**TINY, coupling="ot", pool_size=250, minibatch=64)
    count = len(starts(model.batches(moons), 40))
    assert 4*64*.95 < count <= 4*64*1.05  # four minibatches; rounding may split a few
    assert model.seconds["pairs"] > 0


def test_fresh_couplings_do_not_repeat():
    batches = FlowMatching(**TINY, coupling="ot", minibatch=64).batches(moons)
    assert len(starts(batches, 10)) > .95*640


def test_couplings_keep_both_marginals():
    images = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))*2 - 1
    for coupling in ("independent", "ot"):
        model = FlowMatching(**TINY, coupling=coupling, minibatch=64)
        x, t, v = next(model.batches(images))
        data = (x + (1 - t.view(-1, 1, 1, 1))*v).flatten(1)
        assert abs(data.mean()) < .05 and abs(data.square().mean() - 1) < .05


# ---- rectified flow

def test_a_reflow_learns_the_ends_of_its_teacher(teacher):
    model = FlowMatching(**TINY, coupling="reflow", pool_size=512, ode_steps=4)
    x, t, v = next(model.batches(moons, teacher=teacher))
    start = x - t[:, None]*v
    end, _ = integrate(teacher.net, start, 4, "heun")
    assert_close(start + v, end, atol=1e-4, rtol=1e-4)


def test_a_reflow_starts_from_the_weights_of_its_teacher(teacher):
    before = {name: w.clone() for name, w in teacher.net.state_dict().items()}
    model = fitted("reflow", teacher, lr=1e-12)
    for name, w in model.net.state_dict().items():
        assert_close(w, before[name], atol=1e-5, rtol=0)
        assert torch.equal(teacher.net.state_dict()[name], before[name])


def test_reflow_chains_down_to_flow_matching(teacher):
    model = reflow(moons, rounds=2, pool_size=128, progress=False, **TINY)
    assert model.config.coupling == model.teacher.config.coupling == "reflow"
    first = model.teacher.teacher
    assert first.config.coupling == "independent" and same(first, teacher)
    with pytest.raises(ValueError, match="rounds.*0"):
        reflow(moons, rounds=0)


@pytest.mark.slow
def test_a_reflow_straightens_and_keeps_the_ends():
    settings = dict(train_steps=800, batch_size=256, width=48, depth=2, sample_steps=20,
                    device="cpu")
    fm = FlowMatching(**settings).fit(moons, progress=False)
    rectified = FlowMatching(**settings, coupling="reflow", pool_size=2**14)
    rectified.fit(moons, progress=False, teacher=fm)

    def bend(model):
        v = model.sample(500, trajectory=True).diff(dim=0)
        return ((v - v.mean(0)).square().sum()/v.square().sum()).item()
    assert bend(rectified) < .4*bend(fm)
    y = sample_2d("moons", 4000, 9)
    assert sw2(rectified.sample(4000, 2), y) < .6*sw2(fm.sample(4000, 2), y)
    assert sw2(rectified.sample(4000), y) < 1.5*sw2(fm.sample(4000), y) + .05


@pytest.mark.parametrize("kind, teach", (("FM", True), ("reflow", False)))
def test_a_teacher_belongs_to_a_reflow(teacher, kind, teach):
    model = FlowMatching(**TINY, **KINDS[kind])
    with pytest.raises(ValueError, match="^teacher"):
        model.fit(moons, progress=False, teacher=teacher if teach else None)


def test_a_teacher_without_a_network_is_refused():
    model = FlowMatching(**TINY, coupling="reflow", pool_size=64)
    with pytest.raises(RuntimeError, match="no network"):
        model.fit(moons, progress=False, teacher=FlowMatching(**TINY))


def test_a_teacher_in_another_unit():
    "Pairs are in the student's unit, whatever the teacher's data were."
    wide = FlowMatching(**TINY).fit(10*moons, progress=False)
    model = FlowMatching(**TINY, coupling="reflow", pool_size=512)
    x, t, v = next(model.batches(moons, teacher=wide))
    ends = x + (1 - t[:, None])*v
    assert 5 < ends.std() < 20


# ---- what every kind promises

@each
def test_same_seed_same_weights(kind, teacher):
    state = torch.get_rng_state()
    first = fitted(kind, teacher, seed=3)
    assert same(first, fitted(kind, teacher, seed=3))
    assert not same(first, fitted(kind, teacher, seed=4))
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_file_and_back(kind, teacher, tmp_path):
    model = fitted(kind, teacher)
    model.save(tmp_path/"m")
    again = FlowMatching.load(tmp_path/"m", "cpu")
    assert again.config == model.config
    assert torch.equal(again.sample(20, seed=5), model.sample(20, seed=5))
    with pytest.raises(ValueError, match="FlowMatching.*NSGF"):
        NSGF.load(tmp_path/"m")


@each
def test_a_source_of_its_own(kind, teacher):
    g = torch.Generator().manual_seed(0)

    def source(n):
        return source_2d("8gaussians-moons", n, g)
    model = fitted(kind, teacher, source=source)
    assert model.source == "given" and model.sample(10).shape == (10, 2)


@each
def test_batches_train_a_network_of_ones_own(kind, teacher):
    options = dict(teacher=teacher) if kind == "reflow" else {}
    batches = FlowMatching(**TINY, **KINDS[kind]).batches(moons, **options)
    result = Loop()(Trainer(MLP((2,), 16, 1), batches, 10), progress=False)
    assert result.losses.shape == (10,) and result.losses.isfinite().all()


@each
def test_images(kind):
    x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))*2 - 1
    teacher = FlowMatching(**TINY).fit(x, progress=False)
    assert fitted(kind, teacher, data=x).sample(3).shape == (3, 1, 4, 4)


def test_a_gaussian_is_learned():
    data = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))*.5 + 3
    model = FlowMatching(train_steps=600, batch_size=256, width=32, depth=2, device="cpu")
    x = model.fit(data, progress=False).sample(4000, steps=20)
    assert_close(x.mean(0), data.mean(0), atol=.06, rtol=0)
    assert_close(x.std(0), data.std(0), atol=.06, rtol=0)


@pytest.mark.parametrize("settings, words", (
    (dict(coupling="best"), "coupling.*independent.*best"), (dict(path="round"), "path.*round"),
    (dict(sample_steps=0), "sample_steps"), (dict(minibatch=0), "minibatch"),
    (dict(pool_size=-1), "pool_size"), (dict(ode_steps=0), "ode_steps"),
    (dict(coupling_blur=0.), "coupling_blur"),
))
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        FlowMatching(**settings)


def test_a_config_of_another_model():
    with pytest.raises(TypeError, match="config.*FlowMatchingConfig"):
        FlowMatching(NSGF.Config())
    assert FlowMatchingConfig().coupling == "independent"
