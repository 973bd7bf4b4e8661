"""Euler, the particle flow and the pool: shapes, schedules, the exact assignment as a limit, what the pool keeps."""
import math
import warnings

import ot
import pytest
import torch
from torch.testing import assert_close

from nsgf_nb.flow import TrajectoryPool, euler, particle_flow
from nsgf_nb.sinkhorn import velocity


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def generator(seed=0): return torch.Generator().manual_seed(seed)


# ---- euler

def test_euler_hands_over_times_and_keeps_the_shape():
    seen = []
    def field(x, t):
        seen.append(t)
        return torch.ones_like(x)
    x = normal(3, 1, 2, 2).double()
    xs = euler(field, x, steps=4, trajectory=True)
    assert xs.shape == (5, 3, 1, 2, 2) and torch.equal(xs[0], x)
    assert_close(torch.stack(seen), torch.tensor([0., .25, .5, .75]).double()[:, None].expand(4, 3))
    assert_close(xs[-1], euler(field, x, steps=4))
    assert_close(xs[-1], x + 1)


def test_euler_is_of_first_order_and_builds_no_graph():
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    def field(x, t): return w*x*t[:, None]                            # dx/dt = x t: x(1) = x(0)·√e
    x = torch.ones(1, 1).double()
    errors = [abs(euler(field, x, n).item() - math.exp(.5)) for n in (50, 100)]
    assert errors[0]/errors[1] == pytest.approx(2, rel=.05)
    assert not euler(field, x, 2).requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("steps", (0, -3))
def test_steps_below_one_are_refused(steps):
    x = normal(4, 2)
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"): euler(lambda x, t: x, x, steps)
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"): particle_flow(x, x, .5, steps=steps)


# ---- particle flow

@pytest.mark.parametrize("lead_x, lead_y", (((), ()), ((3,), (3,)), ((2, 3), (2, 3)), ((3,), ()), ((), (3,)), ((2, 1), (3,))))
def test_flow_shapes(lead_x, lead_y):
    x, y = normal(*lead_x, 8, 2), normal(*lead_y, 6, 2, seed=1)
    xs = particle_flow(x, y, blur=.5, steps=3)
    lead = torch.broadcast_shapes(lead_x, lead_y)
    assert xs.shape == (4, *lead, 8, 2) and torch.equal(xs[0], x.expand(*lead, 8, 2)) and not xs.requires_grad


def test_flow_is_its_euler_steps():
    x, y = normal(20, 2).double(), normal(15, 2, seed=1).double() + 2
    blurs, etas = [1., .7, .5, .5], torch.tensor([.2, .9, .4, 1.])
    xs = particle_flow(x, y, blurs, etas, steps=4, tol=1e-9)
    for k in range(4):
        assert_close(xs[k + 1], xs[k] + etas[k].item()*velocity(xs[k], y, blurs[k], tol=1e-9), atol=1e-6, rtol=0)
    assert not torch.allclose(xs[1], particle_flow(x, y, .5, etas, steps=4)[1], atol=1e-3)     # the first blur counts


@pytest.mark.parametrize("self_term", ("same", "masked", "independent"))
def test_flows_do_not_depend_on_how_many_are_taken_together(self_term, monkeypatch):
    from nsgf_nb import sinkhorn
    x, y = normal(2, 3, 16, 2), normal(3, 12, 2, seed=1) + 1
    together = particle_flow(x, y, .5, steps=3, tol=1e-5, self_term=self_term)
    monkeypatch.setitem(sinkhorn._SLICE, "cpu", 2*16*16)                # two flows at a time
    assert_close(particle_flow(x, y, .5, steps=3, tol=1e-5, self_term=self_term), together, atol=1e-4, rtol=0)
    if self_term != "independent":
        for i in range(2):
            for j in range(3): assert_close(particle_flow(x[i, j], y[j], .5, steps=3, tol=1e-5, self_term=self_term), together[:, i, j], atol=1e-4, rtol=0)


@pytest.mark.parametrize("lead_x, lead_y", (((8,), ()), ((8,), (1,)), ((5, 3), (3,)), ((), (4,))))
def test_independent_flows_of_any_leading_shape(lead_x, lead_y):
    x, y, lead = normal(*lead_x, 16, 2), normal(*lead_y, 12, 2, seed=1) + 1, torch.broadcast_shapes(lead_x, lead_y)
    kw = dict(blur=.5, steps=3, tol=1e-5, self_term="independent")
    xs = particle_flow(x, y, **kw)
    assert_close(xs, particle_flow(x.expand(*lead, 16, 2), y.expand(*lead, 12, 2).clone(), **kw), atol=1e-4, rtol=0)
    x0 = xs[0]
    v = velocity(x0, y, .5, 1e-5, self_term=x0.roll(1, -3))
    assert_close(xs[1], x0 + v/3, atol=1e-4, rtol=0)


def test_a_flow_takes_no_second_batch():
    x = normal(3, 5, 2)
    with pytest.raises(ValueError, match="self_term of a flow must be .* got Tensor"): particle_flow(x, x, .5, self_term=x)


def test_default_steps_are_one_over_what_is_left():
    x, y = normal(12, 2).double(), normal(12, 2, seed=1).double()
    assert torch.equal(particle_flow(x, y, .5, steps=4), particle_flow(x, y, .5, [1/4, 1/3, 1/2, 1], steps=4))


def test_flow_at_tiny_blur_is_the_exact_assignment_at_constant_speed():
    n = 40
    x, y = normal(n, 2).double(), normal(n, 2, seed=1).double()*.5 + 2
    plan = torch.as_tensor(ot.emd([], [], torch.cdist(x, y).square().numpy()))
    partner = y[plan.argmax(1)]
    t = torch.linspace(0, 1, 6).double()[:, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xs = particle_flow(x, y, blur=.01, steps=5, tol=1e-5, max_iter=5000)
    assert_close(xs, (1 - t)*x + t*partner, atol=2e-2, rtol=0)


@pytest.mark.parametrize("kw, words", (
    (dict(blur=0.), "blur must be positive"), (dict(blur=math.nan), "blur must be positive"), (dict(blur=[.1, -1., .1]), "blur must be positive"),
    (dict(blur=[.1]*4), "blur must be a number or 3 of them, got 4"), (dict(blur=.1, eta=0.), r"eta must be in \(0, 1\]"),
    (dict(blur=.1, eta=1.01), "eta must be in"), (dict(blur=.1, eta=[.5]), "eta must be a number or 3 of them, got 1"),
))
def test_bad_schedules_are_refused(kw, words):
    with pytest.raises(ValueError, match=words): particle_flow(normal(4, 2), normal(4, 2), steps=3, **kw)


# ---- the pool

def filled(capacity=64, shape=(2,), adds=1, B=4, n=16, **kw):
    pool = TrajectoryPool(capacity, shape, blur=.5, **kw)
    for i in range(adds): pool.add(normal(B, n, *shape, seed=2*i), normal(B, n, *shape, seed=2*i + 1) + 3)
    return pool


def test_pool_is_deterministic_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    a, b = filled(), filled()
    assert torch.equal(a.states, b.states)
    for p, q in zip(a.batch(50, generator(3)), b.batch(50, generator(3))): assert torch.equal(p, q)
    assert not torch.equal(a.batch(50, generator(3))[0], a.batch(50, generator(4))[0])
    assert torch.equal(state, torch.get_rng_state())


def test_pool_keeps_what_add_returns():
    pool = TrajectoryPool(32, (2,), steps=3, blur=.5)
    x, y = normal(2, 16, 2), normal(2, 10, 2, seed=1)                    # a target minibatch of another size
    xs = pool.add(x, y)
    assert xs.shape == (4, 2, 16, 2) and len(pool) == 32 and pool.seconds > 0
    assert torch.equal(pool.states, xs.flatten(1, 2)) and torch.equal(xs[0], x)
    assert_close(xs, particle_flow(x, y, .5, steps=3, tol=1e-2))


def test_batch_lies_on_the_paths():
    pool = filled(steps=3)
    x, t, u = pool.batch(301, generator())
    assert x.shape == u.shape == (301, 2) and t.shape == (301,) and (0 <= t).all() and (t < 1).all()
    k = (3*t + 1e-5).floor().long()
    w = 3*t - k
    segments = pool.states[:-1] + w.view(-1, 1, 1, 1)*(pool.states[1:] - pool.states[:-1])       # (batch, steps, pairs, 2)
    gap = (segments[torch.arange(301), k] - x[:, None]).norm(dim=-1)
    i = gap.argmin(1)
    assert gap.amin(1).max() < 1e-4
    assert_close(u, 3*(pool.states[k + 1, i] - pool.states[k, i]), atol=1e-5, rtol=0)
    assert w[:150].abs().max() < 1e-5 and (w[150:] > 1e-4).float().mean() > .95                   # half at the states, half between
    assert set(k.tolist()) == {0, 1, 2}


def test_pool_of_images():
    pool = filled(shape=(3, 4, 4), steps=2)
    x, t, u = pool.batch(7, generator())
    assert pool.states.shape == (3, 64, 3, 4, 4) and x.shape == u.shape == (7, 3, 4, 4) and t.shape == (7,)
    flat = TrajectoryPool(64, (48,), steps=2, blur=.5)
    flat.add(normal(4, 16, 48), normal(4, 16, 3, 4, 4, seed=1).flatten(2) + 3)
    assert torch.equal(flat.states, pool.states.flatten(2))


def test_ring_buffer_replaces_the_oldest():
    pool = TrajectoryPool(40, (2,), steps=2, blur=.5)
    flows = [pool.add(normal(1, 16, 2, seed=i), normal(1, 16, 2, seed=9 + i)).flatten(1, 2) for i in range(3)]     # 48 pairs
    assert len(pool) == 40
    everything = torch.cat(flows, 1)
    assert torch.equal(pool.states[:, :8], everything[:, 40:]) and torch.equal(pool.states[:, 8:], everything[:, 8:40])
    pool.add(normal(1, 16, 2, seed=5), normal(1, 16, 2, seed=6))
    assert len(pool) == 40 and torch.equal(pool.states[:, 24:], everything[:, 24:40])


def test_more_than_fits_at_once_leaves_whole_paths():
    pool = TrajectoryPool(10, (2,), steps=2, blur=.5)
    flows = pool.add(normal(2, 16, 2), normal(2, 16, 2, seed=1)).flatten(1, 2)
    assert len(pool) == 10
    newest = flows[:, -10:]
    order = (pool.states[0][:, None] == newest[0]).all(-1).float().argmax(1)
    assert sorted(order.tolist()) == list(range(10)) and torch.equal(pool.states, newest[:, order])


def test_only_what_has_been_filled_is_dealt():
    pool = filled(capacity=1000, B=1, n=4)
    pool.states[:, 4:] = math.nan
    assert all(u.isfinite().all() for u in pool.batch(500, generator()))
    with pytest.raises(ValueError, match=r"the pool is empty: call add\(x, y\) first"): TrajectoryPool(8, (2,)).batch(4, generator())


@pytest.mark.parametrize("x, y", ((normal(2, 8, 4), normal(2, 8, 4)), (normal(2, 8, 2), normal(2, 8, 3)), (normal(2, 8, 2), normal(2, 8, 1, 2))))
def test_samples_of_another_shape_are_refused(x, y):
    with pytest.raises(ValueError, match="shape|features"): TrajectoryPool(64, (2,), blur=.5).add(x, y)
