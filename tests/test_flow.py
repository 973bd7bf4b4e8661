"""The integrator against closed forms, the particle flow against its limits, and the pool."""
import builtins
import math
import warnings
from types import SimpleNamespace

import ot
import pytest
import torch
from torch.testing import assert_close

from nsgf_nb.flow import FlowSettings, PoolRecipe, TrajectoryPool, integrate, particle_flow
from nsgf_nb.sinkhorn import velocity

ORDER = {"euler": 1, "adams": 2, "midpoint": 2, "heun": 2, "rk4": 4}
CALLS = {"euler": 1, "adams": 1, "midpoint": 2, "heun": 2, "rk4": 4}  # of each step
STARTS = torch.tensor([0., .1, .5, .9, 1.], dtype=torch.float64)
each_method = pytest.mark.parametrize("method", ORDER)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def doubles(*shape, seed=0):
    return normal(*shape, seed=seed, dtype=torch.float64)


def wide(t, x):
    return t.view(-1, *[1]*(x.ndim - 1))


# ---- integrate

def field(x, t):
    "dx/dt = x cos(3t) + t, which depends on both; its solution is below."
    return x*torch.cos(3*wide(t, x)) + wide(t, x)


def solution(x, start, n=4000):
    "x(1) = e^{s(1)} (x e^{-s(start)} + ∫ t e^{-s(t)} dt) with s(t) = sin(3t)/3, by Simpson's rule."
    t = start[:, None] + (1 - start)[:, None]*torch.linspace(0, 1, n + 1, dtype=x.dtype)
    weights = torch.ones(n + 1, dtype=x.dtype)
    weights[1:-1:2] = 4
    weights[2:-1:2] = 2
    integral = (t*(-(3*t).sin()/3).exp()*weights).sum(1)*(1 - start)/(3*n)
    moved = x*wide(torch.exp(-(3*start).sin()/3), x) + wide(integral, x)
    return math.exp(math.sin(3)/3)*moved


class Counted:
    "The field, counting the rows that it sees; a last feature that does not move names the sample."
    def __init__(self, x):
        self.x = torch.cat([x, torch.arange(len(x), dtype=x.dtype)[:, None]], 1)
        self.rows = torch.zeros(len(x), dtype=torch.long)
        self.times = []

    def __call__(self, x, t):
        assert t.shape == (len(x),) and t.dtype == x.dtype and not torch.is_grad_enabled()
        self.rows += torch.bincount(x[:, -1].round().long(), minlength=len(self.rows))
        self.times.append(t)
        v = field(x, t)
        v[:, -1] = 0
        return v


@each_method
@pytest.mark.parametrize("time_power", (1., 2.5))
def test_order_of_convergence_from_every_start(method, time_power):
    x = doubles(5, 2, 3)
    exact = solution(x, STARTS)
    options = dict(method=method, t_start=STARTS, time_power=time_power)
    steps, close = (80, .7) if method == "rk4" else (200, .2)  # of rk4 more steps reach float64's
    ends = [integrate(field, x, n, **options)[0] for n in (steps, 2*steps)]
    coarse, fine = ((end - exact).flatten(1).norm(dim=1) for end in ends)
    assert (coarse[:4]/fine[:4]).log2().tolist() == pytest.approx([ORDER[method]]*4, abs=close)
    assert fine[4] < 1e-12 and fine.max() < 10*time_power**2/(2*steps)**ORDER[method]


@each_method
def test_a_sample_does_not_depend_on_its_neighbours(method):
    x = doubles(7, 2)
    start = torch.linspace(0, 1, 7, dtype=torch.float64)
    for options in (dict(steps=3), dict(step_size=.15)):
        together, nfe = integrate(field, x, method=method, t_start=start, **options)
        for i in range(7):
            one = slice(i, i + 1)
            alone, n = integrate(field, x[one], method=method, t_start=start[one], **options)
            assert_close(together[one], alone, rtol=1e-12, atol=1e-12)
            assert n.item() == nfe[i].item()


def test_one_number_is_every_samples_start():
    x = doubles(4, 2)
    expected = integrate(field, x, t_start=torch.full((4,), .3).double())[0]
    for start in (.3, torch.tensor(.3), torch.tensor([.3])):
        assert_close(integrate(field, x, t_start=start)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("options", (dict(steps=3), dict(step_size=.3, trajectory=True)), ids=str)
def test_dtype_shape_graph_and_inputs(dtype, options):
    x = normal(4, 3, 2, 2, dtype=dtype)
    start = torch.tensor([0., .5, .7, 1.])
    w = torch.ones((), dtype=dtype, requires_grad=True)
    before = x.clone(), start.clone()
    y, nfe = integrate(lambda x, t: w*x, x, t_start=start, **options)
    assert y.dtype == dtype and y.shape[-4:] == x.shape and not y.requires_grad
    assert nfe.dtype == torch.int64 and nfe.shape == (4,) and torch.is_grad_enabled()
    assert torch.equal(x, before[0]) and torch.equal(start, before[1])


def test_steps_have_equal_widths_and_the_precision_of_the_states():
    v = Counted(doubles(3, 2))
    states, nfe = integrate(v, v.x, steps=3, trajectory=True)
    assert states.shape == (4, 3, 3) and torch.equal(states[0], v.x) and nfe.tolist() == [3]*3
    thirds = torch.tensor([0, 1/3, 2/3], dtype=torch.float64)
    assert_close(torch.stack(v.times)[:, 0], thirds, rtol=0, atol=1e-14)
    assert torch.equal(states[-1], integrate(v, v.x, steps=3)[0])
    assert torch.equal(states[-1], integrate(v, v.x, steps=3, time_power=1.)[0])


@each_method
def test_time_power_sets_the_ends_of_the_steps(method):
    start = torch.tensor([0., .4, 1.], dtype=torch.float64)
    v = Counted(doubles(3, 2))
    _, nfe = integrate(v, v.x, 5, method, start, time_power=2.5)
    assert torch.equal(v.rows, nfe) and nfe.tolist() == [5*CALLS[method]]*3
    for k in range(5):
        expected = start + (1 - start)*(k/5)**2.5
        assert_close(v.times[k*CALLS[method]], expected, rtol=1e-6, atol=1e-6)


def test_adams_remembers_the_last_slope():
    x = doubles(3, 2)
    widths = torch.tensor([.2, .3], dtype=torch.float64)
    first = field(x, torch.zeros(3, dtype=torch.float64))
    middle = x + widths[0]*first
    second = field(middle, torch.full((3,), .2, dtype=torch.float64))
    change = second + widths[1]/(2*widths[0])*(second - first)
    end, _ = integrate(field, x, method="adams", times=[0., .2, .5])
    assert_close(end, middle + widths[1]*change, rtol=1e-12, atol=1e-12)
    one, _ = integrate(field, x, 1, "adams")
    assert_close(one, integrate(field, x, 1, "euler")[0])


SIZES = (.07, .1, .3, 1.)


@each_method
@pytest.mark.parametrize("options", [dict(step_size=h) for h in SIZES] + [dict(steps=5)], ids=str)
def test_nfe_is_what_the_field_saw(method, options):
    start = torch.tensor([0., 0., .05, .3, .5, .65, .9, .999, 1.])
    v = Counted(doubles(9, 2))
    _, nfe = integrate(v, v.x, method=method, t_start=start, **options)
    assert torch.equal(v.rows, nfe)
    assert len(v.times) == nfe.max()  # one call for all that are not yet there
    assert max(t.max() for t in v.times) <= 1
    steps = nfe//CALLS[method]
    if "step_size" in options:
        width = options["step_size"]
        needed = [max(1, math.ceil((1 - s)/width - 1e-3)) for s in start.tolist()]
        assert steps.tolist() == needed and ((1 - start)/steps <= width + 1e-4).all()
    else:
        assert (steps == 5).all()


@pytest.mark.parametrize("step_size, n", ((.1, 10), (.2, 5), (.05, 20), (1/3, 3), (.3, 4)))
def test_a_step_size_that_divides_the_way_takes_no_extra_step(step_size, n):
    for dtype in (torch.float32, torch.float64):
        assert integrate(field, normal(2, 2, dtype=dtype), step_size=step_size)[1].tolist() == [n]*2


def test_trajectories_stay_where_they_arrived():
    start = torch.tensor([0., .55, 1.])
    states, nfe = integrate(field, doubles(3, 2), t_start=start, step_size=.2, trajectory=True)
    assert states.shape == (6, 3, 2) and nfe.tolist() == [5, 3, 1]
    for i, n in enumerate(nfe.tolist()):
        assert (states[n:, i] == states[n, i]).all()
    assert (states[1:4, 1] != states[:3, 1]).all()


@each_method
def test_a_list_of_times(method):
    v = Counted(doubles(4, 2))
    times = [.1, .25, .7, .9]
    states, nfe = integrate(v, v.x, method=method, times=times, trajectory=True)
    assert states.shape == (4, 4, 3) and torch.equal(v.rows, nfe)
    assert nfe.tolist() == [3*CALLS[method]]*4
    assert torch.stack(v.times[::CALLS[method]])[:, 0].tolist() == times[:3]
    even = [k/8 for k in range(9)]
    by_times = integrate(field, v.x, method=method, times=even)[0]
    assert_close(by_times, integrate(field, v.x, 8, method)[0], rtol=1e-12, atol=1e-12)


def test_dopri5_is_accurate_and_counted():
    pytest.importorskip("torchdiffeq")
    v = Counted(doubles(5, 2))
    y, nfe = integrate(v, v.x, method="dopri5", t_start=STARTS, tol=1e-8)
    assert torch.equal(v.rows, nfe) and nfe.tolist() == [len(v.times)]*5
    assert_close(y[:, :-1], solution(v.x[:, :-1], STARTS), rtol=1e-6, atol=1e-6)
    ends, fewer = integrate(
        v, v.x, method="dopri5", t_start=STARTS, tol=1e-2, trajectory=True)
    assert ends.shape == (2, 5, 3) and torch.equal(ends[0], v.x) and fewer.max() < nfe.min()


def test_dopri5_without_torchdiffeq_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **options):
        if name.split(".")[0] == "torchdiffeq":
            raise ImportError(name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        integrate(field, doubles(2, 2), method="dopri5")
    assert integrate(field, doubles(2, 2), method="heun")[0].shape == (2, 2)


@pytest.mark.parametrize("options, message", (
    (dict(steps=0), "steps.*0"), (dict(steps=-2), "steps.*-2"),
    (dict(method="rk3"), "method.*euler, adams, midpoint, heun, rk4, dopri5.*'rk3'"),
    (dict(method=None), "method"), (dict(step_size=0.), "step_size.*0"),
    (dict(step_size=-.1), "step_size.*-0.1"), (dict(step_size=1.5), "step_size.*1.5"),
    (dict(step_size=math.nan), "step_size"), (dict(t_start=-.1), "t_start.*-0.1"),
    (dict(t_start=torch.tensor([0., .5, math.nan])), "t_start"),
    (dict(t_start=torch.tensor([0., .5, 2.])), "t_start.*0 to 2"),
    (dict(t_start=torch.zeros(2)), r"t_start.*3 of them.*\(2,\)"),
    (dict(t_start=torch.zeros(3, 1)), r"t_start.*\(3, 1\)"), (dict(time_power=0.), "time_power.*0"),
    (dict(time_power=math.nan), "time_power"), (dict(time_power=math.inf), "time_power"),
    (dict(times=[0.]), "times"), (dict(times=[0., .5, .5, 1.]), "times"),
    (dict(times=[-.1, 1.]), "times.*-0.1"), (dict(times=[0., 1.1]), "times.*1.1"),
    (dict(times=[0., 1.], step_size=.1), "times.*step_size"),
    (dict(times=[0., 1.], method="dopri5"), "times.*dopri5"),
), ids=str)
def test_bad_arguments_of_integrate(options, message):
    with pytest.raises(ValueError, match=message):
        integrate(field, doubles(3, 2), **options)


def test_half_a_step_is_a_type_error():
    with pytest.raises(TypeError, match="steps.*2.5"):
        integrate(field, doubles(3, 2), steps=2.5)


# ---- particle flow

LEADS = (((), ()), ((3,), (3,)), ((2, 3), (2, 3)), ((3,), ()), ((), (3,)), ((2, 1), (3,)))
FLOWS = [(*lead, self_term) for lead in LEADS for self_term in ("same", "masked")]
FLOWS += [(*lead, "independent") for lead in LEADS[1:]]  # which needs at least two flows


@pytest.mark.parametrize("lead_x, lead_y, self_term", FLOWS)
def test_flow_of_any_leading_shape(lead_x, lead_y, self_term):
    lead = torch.broadcast_shapes(lead_x, lead_y)
    x, y = normal(*lead_x, 12, 2), normal(*lead_y, 8, 2, seed=1) + 1
    options = dict(blur=.5, steps=3, tol=1e-5, self_term=self_term)
    states = particle_flow(x, y, **options)
    start = x.expand(*lead, 12, 2)
    assert states.shape == (4, *lead, 12, 2) and not states.requires_grad
    assert torch.equal(states[0], start)
    expanded = particle_flow(start.clone(), y.expand(*lead, 8, 2).clone(), **options)
    assert_close(states, expanded, atol=1e-4, rtol=0)
    batch = start.roll(1, -3) if self_term == "independent" else self_term
    v = velocity(start, y, .5, 1e-5, self_term=batch)
    assert_close(states[1], start + v/3, atol=1e-4, rtol=0)


@pytest.mark.parametrize("self_term", ("same", "masked"))
def test_flows_do_not_depend_on_how_many_are_taken_together(self_term):
    x, y = normal(300, 64, 2), normal(300, 64, 2, seed=1) + 1  # 256 fit into a slice on the CPU
    options = dict(blur=.5, steps=2, tol=1e-5, self_term=self_term)
    together = particle_flow(x, y, **options)
    for i in (0, 255, 256, 299):
        assert_close(particle_flow(x[i], y[i], **options), together[:, i], atol=1e-4, rtol=0)


def test_flow_is_its_euler_steps():
    x, y = doubles(20, 2), doubles(15, 2, seed=1) + 2
    blurs = [1., .7, .5, .5]
    etas = torch.tensor([.2, .9, .4, 1.])
    states = particle_flow(x, y, blurs, etas, steps=4, tol=1e-9)
    for k in range(4):
        v = velocity(states[k], y, blurs[k], tol=1e-9)
        assert_close(states[k + 1], states[k] + etas[k].item()*v, atol=1e-6, rtol=0)
    assert not torch.allclose(states[1], particle_flow(x, y, .5, etas, steps=4)[1], atol=1e-3)


def test_default_steps_are_one_over_what_is_left():
    x, y = doubles(12, 2), doubles(12, 2, seed=1)
    expected = particle_flow(x, y, .5, [1/4, 1/3, 1/2, 1], steps=4)
    assert torch.equal(particle_flow(x, y, .5, steps=4), expected)


def test_flow_at_tiny_blur_is_the_exact_assignment_at_constant_speed():
    x, y = doubles(40, 2), doubles(40, 2, seed=1)*.5 + 2
    plan = torch.as_tensor(ot.emd([], [], torch.cdist(x, y).square().numpy()))
    t = torch.linspace(0, 1, 6).double()[:, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states = particle_flow(x, y, blur=.01, steps=5, tol=1e-5, max_iter=5000)
    assert_close(states, (1 - t)*x + t*y[plan.argmax(1)], atol=2e-2, rtol=0)


@pytest.mark.parametrize("options, message", (
    (dict(blur=.1, steps=0), "steps.*0"), (dict(blur=0.), "blur.*0"), (dict(blur=math.nan), "blur"),
    (dict(blur=[.1, -1., .1]), "blur.*-1"), (dict(blur=[.1]*4), "blur.*3 of them, got 4"),
    (dict(blur=.1, eta=0.), "eta.*0"), (dict(blur=.1, eta=1.01), "eta.*1.01"),
    (dict(blur=.1, eta=[.5]), "eta.*3 of them, got 1"),
    (dict(blur=.1, self_term=normal(4, 2)), "self_term.*Tensor"),
    (dict(blur=.1, self_term="independent"), "self_term.*at least 2 flows"),
), ids=str)
def test_bad_arguments_of_a_flow(options, message):
    with pytest.raises(ValueError, match=message):
        particle_flow(normal(4, 2), normal(4, 2), **dict(dict(steps=3), **options))


def test_a_flow_that_diverges_is_stopped(monkeypatch):
    def wrong(x, y, blur, **options):
        return 100*torch.ones_like(x), (torch.zeros(len(y)), torch.zeros(len(x)))

    monkeypatch.setattr("nsgf_nb.flow.velocity", wrong)
    with pytest.raises(FloatingPointError, match="step 0.*eta=0.333.*blur=0.5"):
        particle_flow(normal(4, 2), normal(4, 2), .5, steps=3)


# ---- the pool

SETTINGS = FlowSettings(steps=3, blur=.5)


def filled(capacity=64, shape=(2,), flow=SETTINGS, B=4, n=16):
    pool = TrajectoryPool(flow, capacity)
    pool.add(normal(B, n, *shape), normal(B, n, *shape, seed=1) + 3)
    return pool


def test_pool_is_deterministic_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    a, b = filled(), filled()
    assert torch.equal(a.states, b.states)
    draws = [pool.batch(50, generator(seed)) for pool, seed in ((a, 3), (b, 3), (a, 4))]
    assert all(torch.equal(p, q) for p, q in zip(draws[0], draws[1]))
    assert not torch.equal(draws[0][0], draws[2][0])
    assert torch.equal(before, torch.get_rng_state())


def test_pool_keeps_what_add_returns():
    pool = TrajectoryPool(SETTINGS, 32)
    x, y = normal(2, 16, 2), normal(2, 10, 2, seed=1)  # a target minibatch of another size
    flows = pool.add(x, y)
    assert flows.shape == (4, 2, 16, 2) and len(pool) == 32 and pool.seconds > 0
    assert torch.equal(pool.states, flows.flatten(1, 2)) and torch.equal(flows[0], x)
    assert torch.equal(flows, particle_flow(x, y, .5, steps=3, tol=1e-2))


def test_batch_lies_on_the_paths():
    pool = filled()
    x, t, u = pool.batch(301, generator())
    assert x.shape == u.shape == (301, 2) and (0 <= t).all() and (t < 1).all()
    k = (3*t + 1e-5).floor().long()
    w = 3*t - k
    moves = pool.states[1:] - pool.states[:-1]
    points = pool.states[k] + w.view(-1, 1, 1)*moves[k]  # at that time of every path
    distance = (points - x[:, None]).norm(dim=-1)
    nearest = distance.argmin(1)
    assert distance.amin(1).max() < 1e-4
    assert_close(u, 3*moves[k, nearest], atol=1e-5, rtol=0)
    assert w[:150].abs().max() < 1e-5  # half at the states, half between them
    assert (w[150:] > 1e-4).float().mean() > .95 and set(k.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("share, visited", ((0., 0), (.25, 75), (1., 300)))
def test_the_share_of_visited_states(share, visited):
    _, t, _ = filled().batch(300, generator(), share)
    w = 3*t - (3*t + 1e-5).floor()
    assert (w[:visited].abs() < 1e-5).all() and (w[visited:] > 1e-4).sum() >= .98*(300 - visited)


def test_pool_of_images():
    pool = filled(shape=(3, 4, 4))
    x, t, u = pool.batch(7, generator())
    assert pool.states.shape == (4, 64, 3, 4, 4) and x.shape == u.shape == (7, 3, 4, 4)
    flat = TrajectoryPool(SETTINGS, 64)
    flat.add(normal(4, 16, 48), normal(4, 16, 3, 4, 4, seed=1).flatten(2) + 3)
    assert torch.equal(flat.states, pool.states.flatten(2))


def test_ring_buffer_replaces_the_oldest():
    pool = TrajectoryPool(SETTINGS, 40)
    pairs = [(normal(1, 16, 2, seed=i), normal(1, 16, 2, seed=9 + i)) for i in range(4)]
    paths = torch.cat([pool.add(x, y).flatten(1, 2) for x, y in pairs[:3]], 1)  # 48 of them
    assert len(pool) == 40
    assert torch.equal(pool.states[:, :8], paths[:, 40:])
    assert torch.equal(pool.states[:, 8:], paths[:, 8:40])
    pool.add(*pairs[3])
    assert len(pool) == 40 and torch.equal(pool.states[:, 24:], paths[:, 24:40])


def test_more_than_fits_at_once_leaves_whole_paths():
    pool = TrajectoryPool(SETTINGS, 10)
    newest = pool.add(normal(2, 16, 2), normal(2, 16, 2, seed=1)).flatten(1, 2)[:, -10:]
    order = (pool.states[0][:, None] == newest[0]).all(-1).float().argmax(1)
    assert len(pool) == 10 and sorted(order.tolist()) == list(range(10))
    assert torch.equal(pool.states, newest[:, order])


def test_only_what_has_been_filled_is_dealt():
    pool = filled(capacity=1000, B=1, n=4)
    pool.states[:, 4:] = math.nan
    assert all(u.isfinite().all() for u in pool.batch(500, generator()))
    pool.clear()
    assert len(pool) == 0
    with pytest.raises(ValueError, match="pool is empty"):
        pool.batch(4, generator())
    with pytest.raises(ValueError, match="capacity.*0"):
        TrajectoryPool(capacity=0)


@pytest.mark.parametrize("x, y", (
    (normal(2, 8, 4), normal(2, 8, 4)), (normal(2, 8, 2), normal(2, 8, 3)),
    (normal(2, 8, 2), normal(2, 8, 1, 2)), (normal(8, 2), normal(8, 2))),
    ids=("not the pool's", "not the source's", "another number of axes", "no minibatches"))
def test_samples_of_another_shape_are_an_error(x, y):
    pool = filled()
    before = pool.states.clone()
    with pytest.raises(ValueError, match=r"shape.*\("):
        pool.add(x, y)
    assert torch.equal(pool.states, before)


# ---- building by a recipe

@pytest.mark.parametrize("pairs, minibatch, memory_mb, expected", (
    (2**19, 256, 512, (16, 128, 2**19)),  # 4,096 pairs a call
    (100, 256, 512, (1, 1, 256)),  # one minibatch at least
    (10_000, 100, 512, (40, 2, 8000)),  # whole groups only
    (2**19, 8192, 512, (1, 64, 2**19)),
    (2**19, 100, 1, (40, 5, 20_000)),  # 2**18 floats in steps of 6 × 2
))
def test_sizes_of_a_recipe(pairs, minibatch, memory_mb, expected):
    recipe = PoolRecipe((2,), FlowSettings(), pairs, minibatch, memory_mb)
    assert (recipe.group, recipe.calls, recipe.capacity) == expected


def sampler_from(seed, broken_after=math.inf):
    g = generator(seed)
    sizes = []

    def draw(n):
        sizes.append(n)
        if len(sizes) > broken_after:
            raise KeyboardInterrupt
        return torch.randn(n, 2, generator=g)

    return SimpleNamespace(source=draw, target=draw, sizes=sizes)


RECIPE = PoolRecipe((2,), SETTINGS, pairs=9000, minibatch=128, seed=5, about=dict(data="abc"))


def test_a_pool_is_built_group_by_group():
    sampler, again = sampler_from(0), sampler_from(0)
    pool = TrajectoryPool().build(RECIPE, sampler, progress=False)
    assert sampler.sizes == [4096]*4 and len(pool) == pool.capacity == 8192
    assert pool.flow == SETTINGS and pool.recipe == RECIPE and pool.seconds > 0
    for i in range(2):
        x = again.source(4096).unflatten(0, (32, 128))
        y = again.target(4096).unflatten(0, (32, 128))
        states = SETTINGS.run(x, y).flatten(1, 2)
        assert torch.equal(pool.states[:, 4096*i:4096*(i + 1)], states)


def test_a_pool_is_built_once():
    small = PoolRecipe((2,), SETTINGS, pairs=64, minibatch=32)
    pool = TrajectoryPool().build(small, sampler_from(0), progress=False)
    before = pool.states.clone()
    same = PoolRecipe((2,), FlowSettings(steps=3, blur=.5), pairs=64, minibatch=32)
    assert pool.build(same, None) is pool and torch.equal(pool.states, before)
    with pytest.raises(ValueError, match="pairs 64, not 128"):
        pool.build(PoolRecipe((2,), SETTINGS, pairs=128, minibatch=32), None)
    with pytest.raises(ValueError, match="added by hand"):
        filled().build(small, None)


def test_an_interrupted_build_leaves_an_empty_pool():
    pool = TrajectoryPool()
    with pytest.raises(KeyboardInterrupt):
        pool.build(RECIPE, sampler_from(0, broken_after=2), progress=False)
    assert len(pool) == 0 and pool.recipe is None
    assert len(pool.build(RECIPE, sampler_from(0), progress=False)) == 8192


def test_flows_of_can_be_overridden():
    class Doubled(TrajectoryPool):
        def flows_of(self, groups):
            for states in super().flows_of(groups):
                yield 2*states

    plain, doubled = (
        kind().build(RECIPE, sampler_from(0), progress=False) for kind in (TrajectoryPool, Doubled))
    assert torch.equal(doubled.states, 2*plain.states)
