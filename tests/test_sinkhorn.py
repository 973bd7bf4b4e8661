"""The Sinkhorn solver: parity with POT, batches, dimensions, extremes of blur and position, gradients, invariances, bad input."""
import math
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torch.testing import assert_close

from nsgf_nb.flow import particle_flow
from nsgf_nb.sinkhorn import barycentric_map, check_points, cost, divergence, potentials, velocity

EXACT = dict(tol=1e-10, max_iter=50_000)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def simplex(n, seed=0, dtype=torch.float64):
    w = .2 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (w/w.sum()).to(dtype)


def uniform(n): return torch.full((n,), 1/n, dtype=torch.float64)


def pot(x, y, blur, a=None, b=None):
    "f, g and the plan by POT, in float64; the constant is ours: f and g of equal mean."
    x, y = x.double(), y.double()
    a, b = uniform(len(x)) if a is None else a.double(), uniform(len(y)) if b is None else b.double()
    C, eps = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()/2, blur**2
    plan, log = ot.sinkhorn(a.numpy(), b.numpy(), C.numpy(), eps, method="sinkhorn_log", numItermax=5000, stopThr=1e-10, log=True, warn=False)
    f, g = (eps*(torch.as_tensor(log[k]) - w.log()) for k, w in (("log_u", a), ("log_v", b)))
    k = (g.mean() - f.mean())/2
    return f + k, g - k, torch.as_tensor(plan)


def pot_velocity(x, y, blur, a=None, b=None):
    T, S = (p @ z.double()/p.sum(1, keepdim=True) for z, p in ((y, pot(x, y, blur, a, b)[2]), (x, pot(x, x, blur, a, a)[2])))
    return T - S


def marginal_error(x, y, blur, f, g):
    "L1 error of the worse marginal of the plan that f and g define, computed in float64."
    x, y, f, g = x.double(), y.double(), f.double(), g.double()
    C = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()/2
    P = ((f[:, None] + g - C)/blur**2).exp()/len(x)/len(y)
    return max((P.sum(1) - 1/len(x)).abs().sum().item(), (P.sum(0) - 1/len(y)).abs().sum().item())


# ---- parity

@pytest.mark.parametrize("weighted", (False, True), ids=("uniform", "weighted"))
@pytest.mark.parametrize("n, m, blur", ((40, 40, .5), (30, 50, .6), (50, 20, 1.), (1, 12, .5), (12, 1, .5)))
def test_parity_with_pot(n, m, blur, weighted):
    x, y = normal(n, 2), normal(m, 2, seed=1)*.5 + 1
    weights = (simplex(n), simplex(m, 1)) if weighted else None
    f, g, plan = pot(x, y, blur, *weights or ())
    assert_close(potentials(x, y, blur, weights=weights, **EXACT), (f, g), atol=1e-7, rtol=0)
    T = plan @ y/plan.sum(1, keepdim=True)
    assert_close(barycentric_map(x, y, blur, weights=weights, **EXACT), T, atol=1e-7, rtol=0)
    assert_close(velocity(x, y, blur, weights=weights, **EXACT), pot_velocity(x, y, blur, *weights or ()), atol=1e-6, rtol=0)


def test_parity_with_pot_in_float32():
    x, y = normal(60, 3, dtype=torch.float32), normal(40, 3, seed=1, dtype=torch.float32) + 1
    f, g, _ = pot(x, y, .5)
    ours = potentials(x, y, .5, tol=1e-5)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert_close(torch.cat(ours).double(), torch.cat([f, g]), atol=1e-4, rtol=0)
    assert_close(velocity(x, y, .5, tol=1e-5).double(), pot_velocity(x, y, .5), atol=1e-4, rtol=0)


def test_divergence_is_made_of_pots_values():
    x, y = normal(20, 2), normal(25, 2, seed=1) + 1
    a, b = simplex(20), simplex(25, 1)
    def w(x, y, a, b):
        f, g, _ = pot(x, y, .8, a, b)
        return (a @ f + b @ g).item()
    expected = w(x, y, a, b) - (w(x, x, a, a) + w(y, y, b, b))/2
    assert divergence(x, y, .8, weights=(a, b), **EXACT).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dim, blur", ((50, 1.), (50, 4.), (784, 4.), (784, 15.)))
def test_many_dimensions(dim, blur):
    x, y = normal(32, dim, dtype=torch.float32), normal(48, dim, seed=1, dtype=torch.float32)*.5 + .3
    v, expected = velocity(x, y, blur, tol=1e-4).double(), pot_velocity(x, y, blur)
    assert (v - expected).norm() < 1e-3*expected.norm()


def test_cost_keeps_its_digits_far_from_the_origin():
    x, y = normal(50, 3, dtype=torch.float32) + 1e4, normal(50, 3, seed=1, dtype=torch.float32) + 1e4
    assert_close(cost(x, y).double(), torch.cdist(x.double(), y.double()).square()/2, atol=1e-4, rtol=1e-4)


# ---- batches

def test_a_batch_is_its_problems_one_by_one(monkeypatch):
    import nsgf_nb.sinkhorn as module
    x, y = normal(5, 30, 2), normal(5, 20, 2, seed=1) + torch.arange(5.)[:, None, None]
    f, g = potentials(x, y, .4, **EXACT)
    v, s = velocity(x, y, .4, **EXACT), divergence(x, y, .4, **EXACT)
    for i in range(5):
        assert_close((f[i], g[i]), potentials(x[i], y[i], .4, **EXACT), atol=1e-8, rtol=0)
        assert_close(v[i], velocity(x[i], y[i], .4, **EXACT), atol=1e-8, rtol=0)
        assert_close(s[i], divergence(x[i], y[i], .4, **EXACT), atol=1e-8, rtol=0)
    monkeypatch.setitem(module._SLICE, "cpu", 2*30*20)                     # slices of two problems, the last of one
    assert_close(velocity(x, y, .4, **EXACT), v, atol=1e-8, rtol=0)


@pytest.mark.parametrize("lead_x, lead_y", (((2, 3), (2, 3)), ((2, 1), (3,)), ((), (4,)), ((4,), ()), ((2, 3), (1, 1))))
def test_leading_dimensions_broadcast(lead_x, lead_y):
    x, y = normal(*lead_x, 12, 2), normal(*lead_y, 15, 2, seed=1) + 1
    lead = torch.broadcast_shapes(lead_x, lead_y)
    f, g = potentials(x, y, .5, **EXACT)
    v, s = velocity(x, y, .5, **EXACT), divergence(x, y, .5, **EXACT)
    assert (f.shape, g.shape, v.shape, s.shape) == ((*lead, 12), (*lead, 15), (*lead, 12, 2), lead)
    last = tuple(n - 1 for n in lead)
    x_, y_ = x.expand(*lead, 12, 2)[last], y.expand(*lead, 15, 2)[last]
    assert_close(v[last], velocity(x_, y_, .5, **EXACT), atol=1e-8, rtol=0)
    assert_close(s[last], divergence(x_, y_, .5, **EXACT), atol=1e-8, rtol=0)


def test_weights_of_a_batch():
    x, y = normal(2, 12, 2), normal(2, 15, 2, seed=1) + 1
    a, b = torch.stack([simplex(12), simplex(12, 5)]), simplex(15, 1)
    v, s = velocity(x, y, .5, weights=(a, b), **EXACT), divergence(x, y, .5, weights=(a, b), **EXACT)
    for i in range(2):
        assert_close(v[i], velocity(x[i], y[i], .5, weights=(a[i], b), **EXACT), atol=1e-8, rtol=0)
        assert_close(s[i], divergence(x[i], y[i], .5, weights=(a[i], b), **EXACT), atol=1e-8, rtol=0)


def test_doubled_weight_is_a_doubled_point():
    x, y = normal(10, 2), normal(9, 2, seed=1)
    a = torch.ones(10, dtype=torch.float64).index_fill_(0, torch.tensor(3), 2.)/11
    twice = torch.cat([x, x[3:4]])
    assert_close(velocity(twice, y, .4, **EXACT)[:10], velocity(x, y, .4, weights=(a, uniform(9)), **EXACT), atol=1e-8, rtol=0)


# ---- extremes

@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("blur", (1e-3, 1e-2, .05, .2, 1., 10., 1e3, 1e5))
def test_any_blur_ends_in_numbers_and_says_when_not_converged(blur, dtype):
    x, y = normal(40, 2, dtype=dtype), normal(30, 2, seed=1, dtype=dtype)*.5 + 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        f, g = potentials(x, y, blur, tol=1e-2, max_iter=300)
    said = [str(w.message) for w in caught]
    assert f.isfinite().all() and g.isfinite().all()
    if said: assert len(said) == 1 and "marginal error of" in said[0] and "above tol=1.0e-02" in said[0]
    else:                                            # what float32 resolves of f + g − C, over ε, comes on top
        assert marginal_error(x, y, blur, f, g) < 1.5e-2 + 40*torch.finfo(dtype).eps*f.abs().max().item()/blur**2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v, s = velocity(x, y, blur, max_iter=300), divergence(x, y, blur, max_iter=300)
    assert v.isfinite().all() and s.isfinite() and v.dtype == s.dtype == dtype
    lo, hi = torch.cat([x, y]).amin(0), torch.cat([x, y]).amax(0)
    assert ((x + v) - x.mean(0)).norm(dim=1).max() < 3*(hi - lo).norm()


def test_too_few_iterations_are_reported_with_the_error():
    x, y = normal(40, 2), normal(40, 2, seed=1) + 1
    with pytest.warns(UserWarning, match=r"Sinkhorn stopped at max_iter=5 with a marginal error of \d\.\de[-+]\d\d, above tol=1\.0e-09"):
        barycentric_map(x, y, .05, tol=1e-9, max_iter=5)


def test_small_blur_is_the_best_assignment():
    x, y = normal(25, 2), normal(25, 2, seed=1) + 2
    plan = torch.as_tensor(ot.emd(uniform(25).numpy(), uniform(25).numpy(), torch.cdist(x, y).square().numpy()))
    assert_close(velocity(x, y, .01, tol=1e-6, max_iter=50_000), 25*plan @ y - x, atol=2e-2, rtol=0)


@pytest.mark.parametrize("offset", (1e2, 1e4))
def test_far_from_the_origin(offset):
    x, y = normal(40, 2, dtype=torch.float32), normal(30, 2, seed=1, dtype=torch.float32)*.5 + 1
    x, y = x + offset, y + offset                   # rounds; the reference sees the rounded ones
    expected = pot_velocity(x.double() - offset, y.double() - offset, .3)
    assert_close(velocity(x, y, .3).double(), expected, atol=5e-3 + 1e-6*offset, rtol=0)


def test_a_far_outlier_does_not_disturb_the_others():
    x, y = normal(40, 2, dtype=torch.float32), normal(40, 2, seed=1, dtype=torch.float32)
    y[7] = torch.tensor([300., -200.])
    with warnings.catch_warnings():
        warnings.simplefilter("error")               # it converges
        v = velocity(x, y, .5, tol=1e-3)
    expected = velocity(x.double(), y.double(), .5, tol=1e-6, max_iter=20_000)
    near = expected.norm(dim=1) < 10
    assert near.sum() > 35 and (v - expected)[near].norm(dim=1).median() < .01
    assert (v - expected).norm() < 3e-3*expected.norm()


def test_duplicates():
    x, y = normal(10, 2).repeat(3, 1), torch.zeros(8, 2).double()
    v = velocity(x, y, .3, **EXACT)
    assert_close(v[:10], v[10:20])
    assert_close(v[:10], v[20:])
    assert_close(v[:10], velocity(x[:10], y[:1], .3, **EXACT), atol=1e-7, rtol=0)
    same = torch.ones(6, 3).double()
    assert_close(velocity(same, same + 2, .1, **EXACT), torch.full((6, 3), 2.).double())
    assert divergence(same, same, .1, **EXACT).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("dim", (1, 2, 50))
def test_one_point_each(dim):
    x, y = normal(1, dim), normal(1, dim, seed=1)
    assert_close(velocity(x, y, .1), y - x)
    assert_close(divergence(x, y, .1), (y - x).square().sum()/2)
    f, g = potentials(x, y, .1)
    assert_close(f, g)
    assert_close(f + g, cost(x, y)[0])


# ---- dtypes, warm starts, what is left behind

@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_is_solved_in_float32(dtype):
    x, y = normal(40, 2, dtype=dtype), normal(30, 2, seed=1, dtype=dtype) + 1
    v = velocity(x, y, .3)
    assert v.dtype == barycentric_map(x, y, .3).dtype == dtype
    assert_close(v, velocity(x.float(), y.float(), .3).to(dtype))
    f, g = potentials(x, y, .3)
    assert f.dtype == g.dtype == torch.float32
    assert_close(divergence(x, y, .3).float(), divergence(x.float(), y.float(), .3), atol=2e-2, rtol=2e-2)


def test_dtype_is_that_of_x():
    x, y = normal(20, 2, dtype=torch.float32), normal(20, 2, seed=1)
    assert velocity(x, y, .3).dtype == torch.float32 and velocity(y, x, .3).dtype == torch.float64


def test_warm_start_gives_the_same_answer():
    x, y = normal(40, 2), normal(30, 2, seed=1) + 1
    v, (g, h) = velocity(x, y, .3, return_init=True, **EXACT)
    assert g.shape == (30,) and h.shape == (40,)
    moved = x + .1*v
    cold = velocity(moved, y, .3, **EXACT)
    for init in ((g, h), (.9*g, h), (torch.zeros(30).double(), torch.zeros(40).double()), (normal(30), normal(40))):
        assert_close(velocity(moved, y, .3, init=init, **EXACT), cold, atol=1e-7, rtol=0)
    assert_close(potentials(x, y, .3, init=g, **EXACT), potentials(x, y, .3, **EXACT), atol=1e-7, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")               # from the solution no iteration is needed
        velocity(x, y, .3, tol=1e-8, max_iter=0, init=(g, h))


@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_grad_mode_and_inputs_are_left_as_found(mode):
    x, y = normal(20, 2).requires_grad_(), normal(20, 2, seed=1)
    x0, y0, state = x.detach().clone(), y.clone(), torch.get_rng_state()
    with mode():
        before = torch.is_grad_enabled()
        v, T = velocity(x, y, .3), barycentric_map(x, y, .3)
        f, g = potentials(x, y, .3)
        s = divergence(x, y, .3)
        assert torch.is_grad_enabled() == before
        with pytest.raises(ValueError): velocity(x, y, -1.)
        assert torch.is_grad_enabled() == before
    assert not any(u.requires_grad for u in (v, T, f, g))
    assert s.requires_grad == (mode is torch.enable_grad)
    assert torch.equal(x, x0) and torch.equal(y, y0) and torch.equal(state, torch.get_rng_state())


def test_divergence_is_the_same_with_and_without_a_graph():
    x, y = normal(20, 2), normal(25, 2, seed=1)
    assert torch.equal(divergence(x, y, .3), divergence(x.clone().requires_grad_(), y, .3).detach())


# ---- gradients

def slope(f, at, along, h=1e-4): return ((f(at + h*along) - f(at - h*along))/(2*h)).item()


@pytest.mark.parametrize("weighted", (False, True), ids=("uniform", "weighted"))
def test_gradient_in_the_points_is_the_finite_difference(weighted):
    x, y, dx, dy = normal(15, 2), normal(12, 2, seed=1) + 1, normal(15, 2, seed=2), normal(12, 2, seed=3)
    a, b = (simplex(15), simplex(12, 1)) if weighted else (uniform(15), uniform(12))
    kw = dict(blur=.5, weights=(a, b) if weighted else None, **EXACT)
    gx, gy = torch.autograd.grad(divergence(x.requires_grad_(), y.requires_grad_(), **kw), (x, y))
    x, y = x.detach(), y.detach()
    assert (gx*dx).sum().item() == pytest.approx(slope(lambda u: divergence(u, y, **kw), x, dx), rel=1e-5, abs=1e-7)
    assert (gy*dy).sum().item() == pytest.approx(slope(lambda u: divergence(x, u, **kw), y, dy), rel=1e-5, abs=1e-7)
    assert_close(-gx/a[:, None], velocity(x, y, **kw), atol=1e-7, rtol=0)


def test_gradient_of_a_cloud_against_itself():
    "One tensor on both sides: the two parts of the gradient cancel."
    x = normal(15, 2).requires_grad_()
    g, = torch.autograd.grad(divergence(x, x, .5, **EXACT), x)
    assert g.abs().max() < 1e-7


def test_gradient_in_the_weights_is_the_first_variation():
    "Theorem 1, in finite dimensions: along a change of mass that sums to zero."
    x, y = normal(15, 2), normal(12, 2, seed=1) + 1
    a, b = simplex(15), simplex(12, 1)
    da, db = normal(15, seed=2)*a, normal(12, seed=3)*b
    da, db = da - a*da.sum(), db - b*db.sum()
    def s(a, b): return divergence(x, y, .5, weights=(a, b), **EXACT)
    ga, gb = torch.autograd.grad(s(a.requires_grad_(), b.requires_grad_()), (a, b))
    a, b = a.detach(), b.detach()
    assert (ga*da).sum().item() == pytest.approx(slope(lambda u: s(u, b), a, da), rel=1e-5, abs=1e-7)
    assert (gb*db).sum().item() == pytest.approx(slope(lambda u: s(a, u), b, db), rel=1e-5, abs=1e-7)
    variation = potentials(x, y, .5, weights=(a, b), **EXACT)[0] - potentials(x, x, .5, weights=(a, a), **EXACT)[0]
    assert (ga*da).sum().item() == pytest.approx((variation*da).sum().item(), rel=1e-6)


# ---- properties

few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
SOLVED = dict(tol=1e-9, max_iter=20_000)


@st.composite
def clouds(draw):
    "x, y and blur; coordinates are as nasty as hypothesis likes, blur is not tiny against their range of ±4."
    n, m, d = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    elements = st.floats(-4, 4, width=32, allow_subnormal=False)
    x, y = (torch.as_tensor(draw(arrays(np.float64, (k, d), elements=elements))) for k in (n, m))
    return x, y, draw(st.floats(1.5, 5))


@few
@given(clouds(), st.randoms(use_true_random=False))
def test_permutation_equivariance(case, random):
    x, y, blur = case
    p, q = (torch.tensor(random.sample(range(len(z)), len(z))) for z in (x, y))
    assert_close(velocity(x[p], y[q], blur, **SOLVED), velocity(x, y, blur, **SOLVED)[p], atol=1e-6, rtol=0)


@few
@given(clouds(), st.floats(-1e3, 1e3))
def test_translation_invariance(case, shift):
    x, y, blur = case
    assert_close(velocity(x + shift, y + shift, blur, **SOLVED), velocity(x, y, blur, **SOLVED), atol=1e-6, rtol=0)
    assert_close(divergence(x + shift, y + shift, blur, **SOLVED), divergence(x, y, blur, **SOLVED), atol=1e-6, rtol=0)


@few
@given(clouds(), st.floats(1e-4, 1e4))
def test_scale_equivariance(case, s):
    x, y, blur = case
    assert_close(velocity(s*x, s*y, s*blur, **SOLVED)/s, velocity(x, y, blur, **SOLVED), atol=1e-6, rtol=0)
    assert_close(divergence(s*x, s*y, s*blur, **SOLVED)/s**2, divergence(x, y, blur, **SOLVED), atol=1e-6, rtol=0)


@few
@given(clouds())
def test_divergence_is_symmetric_and_not_negative(case):
    x, y, blur = case
    s = divergence(x, y, blur, **SOLVED).item()
    assert s == pytest.approx(divergence(y, x, blur, **SOLVED).item(), abs=1e-6) and s > -1e-7


@few
@given(clouds())
def test_nothing_moves_at_the_target(case):
    x, _, blur = case
    assert velocity(x, x, blur, **SOLVED).abs().max() < 1e-6
    assert abs(divergence(x, x, blur, **SOLVED).item()) < 1e-6


@few
@given(clouds())
def test_targets_stay_in_the_hull(case):
    x, y, blur = case
    T = barycentric_map(x, y, blur)
    assert (T >= y.amin(0) - 1e-9).all() and (T <= y.amax(0) + 1e-9).all()
    assert_close(T.mean(0), y.mean(0), atol=.01*(1 + y.abs().max().item()), rtol=0)


# ---- bad input

each_call = pytest.mark.parametrize("call", (potentials, barycentric_map, velocity, divergence))


@each_call
@pytest.mark.parametrize("bad, error, words", (
    (torch.zeros(0, 2), ValueError, r"{} must be a non-empty tensor of shape \(\.\.\., N, D\), got shape \(0, 2\)"),
    (torch.zeros(3, 0), ValueError, r"{} must .* got shape \(3, 0\)"),
    (torch.zeros(3), ValueError, r"{} must be .* got shape \(3,\)"),
    (torch.zeros(4, 2, dtype=torch.int64), TypeError, r"{0} must hold floating-point numbers, got torch.int64: convert it with {0}\.float\(\)"),
    (torch.zeros(4, 2, dtype=torch.bool), TypeError, r"{} must hold floating-point numbers, got torch.bool"),
    (np.zeros((4, 2)), TypeError, r"{} must be a torch\.Tensor, got ndarray"),
    ([[0., 1.]], TypeError, r"{} must be a torch\.Tensor, got list"),
    (torch.tensor([[0., 1.], [math.nan, 1.], [0., math.inf]]), ValueError, r"{} has 2 NaN or infinite values among 6, the first at index \(1, 0\)"),
), ids=("empty", "no features", "1D", "ints", "bools", "numpy", "list", "nan"))
def test_bad_points_are_refused_by_name(call, bad, error, words):
    good = normal(5, 2)
    with pytest.raises(error, match=words.format("x")): call(bad, good, .3)
    with pytest.raises(error, match=words.format("y")): call(good, bad, .3)


@each_call
def test_different_features_are_refused(call):
    with pytest.raises(ValueError, match=r"y must have 2 features like its partner, got 3 \(shape \(4, 3\)\)"):
        call(normal(5, 2), normal(4, 3), .3)


@each_call
@pytest.mark.parametrize("blur", (0, 0., -1., math.nan, math.inf, "0.1", None, torch.tensor(.1)), ids=repr)
def test_bad_blur_is_refused(call, blur):
    with pytest.raises(ValueError, match="blur must be a positive number, in the units of x, got"): call(normal(5, 2), normal(4, 2), blur)


@each_call
@pytest.mark.parametrize("a, b, words", (
    (simplex(4), simplex(4), r"weights\[0\] must have 5 entries, got shape \(4,\)"),
    (simplex(5), simplex(5), r"weights\[1\] must have 4 entries, got shape \(5,\)"),
    (2*simplex(5), simplex(4), r"weights\[0\] must be positive and sum to 1"),
    (simplex(5), torch.tensor([0., .5, .25, .25]), r"weights\[1\] must be positive and sum to 1"),
    (torch.full((5,), math.nan), simplex(4), r"weights\[0\] must be positive and sum to 1"),
), ids=("length of a", "length of b", "sum", "zero", "nan"))
def test_bad_weights_are_refused(call, a, b, words):
    with pytest.raises(ValueError, match=words): call(normal(5, 2), normal(4, 2), .3, weights=(a, b))


def test_leading_dimensions_that_do_not_broadcast_are_refused():
    with pytest.raises((ValueError, RuntimeError)): velocity(normal(3, 5, 2), normal(2, 5, 2), .3)


def test_check_points_hands_back_what_is_good():
    x = normal(3, 2)
    assert check_points("x", x) is x
    assert check_points("x", x.half()).dtype == torch.float32


# ---- the memory that is kept between calls

CASES = (dict(n=30, m=20, d=2), dict(n=24, m=24, d=40), dict(n=8, m=8, d=200), dict(n=16, m=12, d=2, self_term="masked"), dict(n=16, m=12, d=3, batch=5))

def call_all(n, m, d, batch=2, self_term="same", dtype=torch.float32):
    "What every function returns for one problem, as a flat list."
    x, y = normal(batch, n, d, dtype=dtype), normal(batch, m, d, seed=1, dtype=dtype) + 1
    v, init = velocity(x, y, .5, self_term=self_term, return_init=True)
    return [v, *init, *potentials(x, y, .5), barycentric_map(x, y, .5), divergence(x, y, .5), velocity(x, y[0], .5, self_term=x.flip(-2))]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_no_result_lies_in_memory_that_a_later_call_writes_to(dtype):
    first = [call_all(**case, dtype=dtype) for case in CASES]
    kept = [[t.clone() for t in ts] for ts in first]
    for case in reversed(CASES): call_all(**case, dtype=dtype)
    for case, ts, copies in zip(CASES, first, kept):
        for t, c in zip(ts, copies): assert torch.equal(t, c), case


def test_threads_do_not_share_it():
    from concurrent.futures import ThreadPoolExecutor
    alone = [call_all(**case) for case in CASES]
    with ThreadPoolExecutor(4) as pool:
        for case, ts in zip(CASES*6, pool.map(lambda case: call_all(**case), CASES*6)):
            for t, expected in zip(ts, alone[CASES.index(case)]): assert_close(t, expected, atol=1e-5, rtol=1e-5)


def test_a_call_in_inference_mode_does_not_spoil_the_next():
    from concurrent.futures import ThreadPoolExecutor
    x, y = normal(61, 2, dtype=torch.float32), normal(67, 2, seed=1, dtype=torch.float32)
    def both():
        with torch.inference_mode(): inferred = velocity(x, y, .5).clone()
        return inferred, velocity(x, y, .5)
    with ThreadPoolExecutor(1) as fresh: inferred, after = fresh.submit(both).result()           # a thread that has kept nothing yet
    assert_close(inferred, after, atol=1e-6, rtol=0)


def test_a_start_of_the_wrong_size_is_refused_by_name():
    x, y = normal(5, 2), normal(4, 2, seed=1)
    with pytest.raises(ValueError, match=r"init must have 4 entries for each problem \(\), got shape \(5,\)"): velocity(x, y, .5, init=(torch.zeros(5), None))
    with pytest.raises(ValueError, match=r"init must have 5 entries"): velocity(x, y, .5, init=(None, torch.zeros(4)))


def test_a_start_that_is_no_number_is_refused_by_name():
    x, y = normal(5, 2), normal(4, 2, seed=1)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="init has NaN or infinite values"): potentials(x, y, .5, init=torch.tensor([0., bad, 0., 0.]).double())
    with pytest.raises(TypeError, match="init must be a torch.Tensor, got list"): potentials(x, y, .5, init=[0.]*4)
    with pytest.raises(ValueError, match=r"init must have 4 entries for each problem \(\), got shape \(3, 4\)"): potentials(x, y, .5, init=torch.zeros(3, 4))


def test_starts_and_weights_broadcast_like_clouds():
    x, y = normal(2, 1, 6, 2), normal(3, 5, 2, seed=1) + 1
    g = velocity(x, y, .5, tol=1e-9, return_init=True)[1][0]
    for init in (g[:, :1], g[0], g[0, 0]): assert_close(velocity(x, y, .5, tol=1e-9, init=(init, None)), velocity(x, y, .5, tol=1e-9), atol=1e-6, rtol=0)
    a = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)).double() + .5
    a, b = a/a.sum(-1, keepdim=True), y.new_full((5,), 1/5)
    v = velocity(x[0, 0], y[0], .5, tol=1e-9, weights=(a, b))
    assert v.shape == (2, 6, 2)
    for i in range(2): assert_close(v[i], velocity(x[0, 0], y[0], .5, tol=1e-9, weights=(a[i], b)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("call", (lambda x, y: velocity(x, y, .01, max_iter=3), lambda x, y: divergence(x, y, .01, max_iter=3),
    lambda x, y: potentials(x, y, .01, max_iter=3), lambda x, y: particle_flow(x, y, .01, steps=2, max_iter=3)))
def test_the_warning_points_at_the_caller(call):
    with pytest.warns(UserWarning, match="stopped at max_iter=3") as caught: call(normal(30, 2), normal(30, 2, seed=1))
    assert {w.filename for w in caught} == {__file__}


def test_the_identity_is_taken_for_it_only_within_tol():
    "Two points, 5.4 blurs apart: the plan is the identity to 1e-6, not to 1e-10."
    x = torch.tensor([[0., 0.], [5.4, 0.]], dtype=torch.float64)
    v = velocity(x, x.new_zeros(1, 2), 1., tol=1e-10)
    p = 1/(1 + math.exp(5.4**2/2))                                      # of going to the other, which symmetry makes exact
    assert_close(v[:, 0], x.new_tensor([-5.4*p, -5.4*(1 - p)]), atol=1e-9, rtol=0)


def test_the_gradient_in_the_weights_is_that_of_normalised_weights():
    x, y, w = normal(4, 2), normal(3, 2, seed=1) + 1, torch.tensor([.4, .3, .2, .1]).double()
    b = w.new_full((3,), 1/3)
    def S(w): return divergence(x, y, .7, tol=1e-11, max_iter=20_000, weights=(w/w.sum(), b))
    leaf = w.clone().requires_grad_()
    divergence(x, y, .7, tol=1e-11, max_iter=20_000, weights=(leaf, b)).backward()
    for i in range(4):
        e = torch.zeros(4).double(); e[i] = 1e-4
        assert leaf.grad[i].item() == pytest.approx(((S(w + e) - S(w - e))/2e-4).item(), abs=1e-5)
