"""Integration from each sample's own time: orders of convergence against closed forms, and an NFE that is what was called."""
import builtins
import math
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from nsgf_nb.flow import euler, integrate

ORDER = {"euler": 1, "midpoint": 2, "heun": 2}
adaptive = pytest.mark.skipif(find_spec("torchdiffeq") is None, reason="torchdiffeq is missing: no test of method='dopri5'")
each_method = pytest.mark.parametrize("method", ORDER)
STARTS = torch.tensor([0., .1, .5, .9, 1.], dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
def wide(t, x): return t.view(-1, *[1]*(x.ndim - 1))


def field(x, t):
    "dx/dt = x cos(3t) + t, which depends on both; its solution is below."
    return x*torch.cos(3*wide(t, x)) + wide(t, x)


def solution(x, start, n=4000):
    "x(1) from x(start): e^{s(1)} (x e^{-s(start)} + ∫ t e^{-s(t)} dt) with s(t) = sin(3t)/3, the integral by Simpson's rule."
    t = start[:, None] + (1 - start)[:, None]*torch.linspace(0, 1, n + 1, dtype=x.dtype)
    w = torch.ones(n + 1, dtype=x.dtype); w[1:-1:2], w[2:-1:2] = 4, 2
    integral = (t*(-(3*t).sin()/3).exp()*w).sum(1)*(1 - start)/(3*n)
    return math.exp(math.sin(3)/3)*(x*wide(torch.exp(-(3*start).sin()/3), x) + wide(integral, x))


class Counted:
    "A field that counts the rows that it sees, and of which sample they are: their last entry tells, as it does not move."
    def __init__(self, inner=field): self.inner, self.calls, self.rows, self.times = inner, 0, None, []
    def start(self, x): self.rows = torch.zeros(len(x), dtype=torch.long); return torch.cat([x, torch.arange(len(x), dtype=x.dtype)[:, None]], 1)
    def __call__(self, x, t):
        assert t.shape == (len(x),) and t.dtype == x.dtype and not torch.is_grad_enabled()
        self.calls += 1
        self.rows += torch.bincount(x[:, -1].round().long(), minlength=len(self.rows))
        self.times.append(t)
        v = self.inner(x, t)
        v[:, -1] = 0
        return v


# ---- accuracy

@each_method
def test_order_of_convergence_from_every_start(method):
    x = normal(5, 2, 3)
    exact = solution(x, STARTS)
    errors = torch.stack([(integrate(field, x, STARTS, n, method)[0] - exact).flatten(1).norm(dim=1) for n in (200, 400)])
    assert (errors[0, :4]/errors[1, :4]).log2().tolist() == pytest.approx([ORDER[method]]*4, abs=.12)
    assert errors[1, 4] < 1e-12 and errors[1].max() < 10/400**ORDER[method]


@each_method
def test_step_size_converges_too(method):
    x = normal(5, 2)
    errors = [(integrate(field, x, STARTS, method=method, step_size=h)[0] - solution(x, STARTS)).norm() for h in (.02, .01)]
    assert math.log2(errors[0]/errors[1]) == pytest.approx(ORDER[method], abs=.15)


def test_euler_is_euler():
    x = normal(6, 1, 2, 2)
    for steps in (1, 3, 10):
        found, nfe = integrate(field, x, steps=steps, trajectory=True)
        assert_close(found, euler(field, x, steps, trajectory=True))
        assert nfe.tolist() == [steps]*6
        assert torch.equal(found[-1], integrate(field, x, steps=steps)[0])


@each_method
def test_a_sample_does_not_depend_on_its_neighbours(method):
    x, start = normal(7, 2), torch.linspace(0, 1, 7, dtype=torch.float64)
    for kw in (dict(steps=3), dict(step_size=.15)):
        together, nfe = integrate(field, x, start, method=method, **kw)
        for i in range(7):
            alone, n = integrate(field, x[i:i+1], start[i:i+1], method=method, **kw)
            assert_close(together[i:i+1], alone, rtol=1e-12, atol=1e-12)
            assert n.item() == nfe[i].item()


@each_method
def test_one_number_is_every_samples_start(method):
    x = normal(4, 2)
    for start in (.3, torch.tensor(.3), torch.tensor([.3])):
        assert_close(integrate(field, x, start, 4, method)[0], integrate(field, x, torch.full((4,), .3), 4, method)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("kw", (dict(steps=3), dict(step_size=.3), dict(step_size=.3, method="heun")), ids=str)
def test_dtype_shape_and_graph(dtype, kw):
    x, w = normal(4, 3, 2, 2, dtype=dtype), torch.ones((), dtype=dtype, requires_grad=True)
    y, nfe = integrate(lambda x, t: w*x, x, torch.rand(4), **kw)
    assert y.dtype == dtype and y.shape == x.shape and not y.requires_grad and nfe.dtype == torch.int64 and nfe.shape == (4,) and torch.is_grad_enabled()


def test_the_start_is_left_as_it_was():
    x = normal(4, 2)
    kept, start = x.clone(), torch.tensor([0., .5, .7, 1.])
    for kw in (dict(steps=2), dict(step_size=.2, trajectory=True)): integrate(field, x, start, **kw)
    assert torch.equal(x, kept) and start.tolist() == [0., .5, torch.tensor(.7).item(), 1.]


# ---- the number of calls

@each_method
@pytest.mark.parametrize("kw", (dict(steps=1), dict(steps=5), dict(step_size=.1), dict(step_size=.3), dict(step_size=1.), dict(step_size=.07, trajectory=True)), ids=str)
def test_nfe_is_what_the_field_saw(method, kw):
    x, start, v = normal(9, 2), torch.tensor([0., 0., .05, .3, .5, .65, .9, .999, 1.]), Counted()
    _, nfe = integrate(v, v.start(x), start, method=method, **kw)
    assert torch.equal(v.rows, nfe)
    per = 1 if method == "euler" else 2
    if "step_size" in kw: assert nfe.tolist() == [per*max(1, math.ceil((1 - s)/kw["step_size"] - 1e-3)) for s in start.tolist()]
    else: assert nfe.tolist() == [per*kw["steps"]]*9
    assert v.calls == nfe.max()                                   # one call for all that are not yet there, not one for each


@pytest.mark.parametrize("step_size, n", ((.1, 10), (.2, 5), (.05, 20), (1/3, 3), (.3, 4)))
def test_a_step_size_that_divides_the_way_takes_no_step_more(step_size, n):
    for dtype in (torch.float32, torch.float64):
        assert integrate(field, normal(2, 2, dtype=dtype), 0., step_size=step_size)[1].tolist() == [n, n]


def test_steps_are_no_wider_than_step_size_and_times_stay_below_one():
    v, x, start = Counted(), normal(20, 1), torch.rand(20, generator=torch.Generator().manual_seed(0))
    _, nfe = integrate(v, v.start(x), start, step_size=.13)
    assert ((1 - start)/nfe <= .13 + 1e-4).all() and max(t.max() for t in v.times) < 1
    assert torch.equal(v.times[0].float(), start)


def test_trajectories_stay_where_they_arrived():
    start = torch.tensor([0., .55, 1.])
    xs, nfe = integrate(field, normal(3, 2), start, step_size=.2, trajectory=True)
    assert xs.shape == (6, 3, 2) and nfe.tolist() == [5, 3, 1]
    for i, n in enumerate(nfe.tolist()):
        assert all(torch.equal(x, xs[n, i]) for x in xs[n:, i])
        if i < 2: assert not any(torch.equal(a, b) for a, b in zip(xs[:n, i], xs[1:n + 1, i]))


# ---- adaptive

@adaptive
def test_dopri5_is_accurate_and_counted():
    x, v = normal(5, 2), Counted()
    z = v.start(x)
    y, nfe = integrate(v, z, STARTS, method="dopri5", tol=1e-8)
    assert nfe.tolist() == [v.calls]*5 and torch.equal(v.rows, nfe)
    assert_close(y[:, :-1], solution(x, STARTS), rtol=1e-6, atol=1e-6)
    fewer = Counted()
    assert integrate(fewer, fewer.start(x), STARTS, method="dopri5", tol=1e-2)[1].max() < nfe.min()
    ends, _ = integrate(field, x, STARTS, method="dopri5", tol=1e-8, trajectory=True)
    assert ends.shape == (2, 5, 2) and torch.equal(ends[0], x)


def test_dopri5_without_torchdiffeq_says_what_to_install(monkeypatch):
    inner = builtins.__import__
    def without(name, *args, **kw):
        if name.split(".")[0] == "torchdiffeq": raise ImportError("No module named 'torchdiffeq'")
        return inner(name, *args, **kw)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="dopri5.*pip install torchdiffeq"): integrate(field, normal(2, 2), method="dopri5")
    assert integrate(field, normal(2, 2), method="heun")[0].shape == (2, 2)


# ---- what is refused

@pytest.mark.parametrize("kw, words", (
    (dict(steps=0), "steps must be at least 1, got 0"), (dict(steps=-2), "steps must be at least 1, got -2"),
    (dict(method="rk4"), "method must be one of euler, midpoint, heun, dopri5, got 'rk4'"), (dict(method=None), "method must be one of"),
    (dict(step_size=0.), r"step_size must lie in \(0, 1\], got 0"), (dict(step_size=-.1), "step_size must lie"), (dict(step_size=1.5), "step_size must lie"),
    (dict(step_size=math.nan), "step_size must lie"), (dict(start=-.1), r"start must lie in \[0, 1\], got -0.1 to -0.1"), (dict(start=1.01), "start must lie"),
    (dict(start=torch.tensor([0., .5, math.nan])), "start must lie"), (dict(start=torch.tensor([0., .5, 2.])), r"start must lie in \[0, 1\], got 0 to 2"),
), ids=str)
def test_bad_arguments_are_refused_by_name(kw, words):
    with pytest.raises(ValueError, match=words): integrate(field, normal(3, 2), **kw)


@pytest.mark.parametrize("start", (torch.zeros(2), torch.zeros(3, 1), torch.zeros(4)), ids=lambda t: str(tuple(t.shape)))
def test_starts_of_another_number_are_refused_by_name(start):
    with pytest.raises(ValueError, match="start"): integrate(field, normal(3, 2), start)


def test_half_steps_are_refused():
    with pytest.raises((TypeError, ValueError), match="steps"): integrate(field, normal(3, 2), steps=2.5)


# ---- stretched steps

@each_method
@pytest.mark.parametrize("stretch", (.5, 1., 2.5))
def test_stretched_steps_end_where_they_should(method, stretch):
    v, x, start = Counted(), normal(3, 2), torch.tensor([0., .4, 1.], dtype=torch.float64)
    xs, nfe = integrate(v, v.start(x), start, 5, method, stretch=stretch, trajectory=True)
    per = ORDER[method]
    assert nfe.tolist() == [5*per]*3 and torch.equal(v.rows, nfe) and xs.shape == (6, 3, 3)
    for k in range(5): assert_close(v.times[k*per], start + (1 - start)*(k/5)**stretch, rtol=1e-6, atol=1e-6)
    assert max(t.max() for t in v.times) <= 1
    errors = [(integrate(field, x, start, n, method, stretch=stretch)[0] - solution(x, start)).norm() for n in (200, 400)]
    assert stretch < 1 or math.log2(errors[0]/errors[1]) == pytest.approx(ORDER[method], abs=.2)
    assert errors[1] < .02


def test_a_stretch_of_one_is_none():
    x = normal(4, 2)
    for kw in (dict(steps=7), dict(step_size=.13)): assert torch.equal(integrate(field, x, .2, **kw)[0], integrate(field, x, .2, stretch=1., **kw)[0])


@pytest.mark.parametrize("stretch", (0., -1., math.nan, math.inf))
def test_a_bad_stretch_is_refused_by_name(stretch):
    with pytest.raises(ValueError, match="stretch must be a positive number, got"): integrate(field, normal(3, 2), stretch=stretch)


def test_times_keep_the_precision_of_the_states():
    "A third is no float32 where the states are float64."
    times = []
    integrate(lambda x, t: (times.append(t), x)[1], normal(2, 2), steps=3)
    assert_close(torch.stack(times)[:, 0], torch.tensor([0., 1/3, 2/3], dtype=torch.float64), rtol=0, atol=1e-14)
