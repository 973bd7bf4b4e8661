"""Potentials, map, velocity and divergence against POT, float64 sums and closed forms."""
import functools
import gc
import itertools
import math
import os
import random
import warnings
from pathlib import Path

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import (
    EXACT,
    exact_cost,
    exact_velocity,
    marginal_errors,
    normal,
    radius,
    simplex,
    uniform,
    watched,
)
from torch.testing import assert_close

from nsgf_nb.flow import particle_flow
from nsgf_nb.sinkhorn import barycentric_map, check_points, cost, divergence, potentials, velocity

f32, f64 = torch.float32, torch.float64
FIELDS = {
    "velocity": velocity,
    "barycentric_map": barycentric_map,
    "potentials": potentials,
    "masked": functools.partial(velocity, self_term="masked"),
    "second batch": functools.partial(velocity, self_term=normal(9, 2, seed=5)),
}
each_dtype = pytest.mark.parametrize("dtype", (f32, f64), ids=str)
each_call = pytest.mark.parametrize("call", (potentials, barycentric_map, velocity, divergence))


def close(actual, expected, atol=1e-6):
    assert_close(actual, expected, atol=atol, rtol=0)


# ---- parity with POT

def pot(x, y, blur, a, b):
    "f, g of equal mean and the plan, in float64."
    C = exact_cost(x, y, centred=False)
    plan, log = ot.sinkhorn(
        a.numpy(), b.numpy(), C.numpy(), blur**2, method="sinkhorn_log", numItermax=5000,
        stopThr=1e-10, log=True, warn=False)
    f = blur**2*(torch.as_tensor(log["log_u"]) - a.log())
    g = blur**2*(torch.as_tensor(log["log_v"]) - b.log())
    shift = (g.mean() - f.mean())/2
    return f + shift, g - shift, torch.as_tensor(plan)


def pot_map(x, y, blur, a, b):
    plan = pot(x, y, blur, a, b)[2]
    return plan @ y.double()/plan.sum(1, keepdim=True)


@pytest.mark.parametrize("weighted", (False, True), ids=("uniform", "weighted"))
@pytest.mark.parametrize("n, m, blur", (
    (40, 40, .5), (30, 50, .6), (50, 20, 1.), (1, 12, .5), (12, 1, .5)))
def test_parity_with_pot(n, m, blur, weighted):
    x = normal(n, 2)
    y = normal(m, 2, seed=1)*.5 + 1
    a, b = (simplex(n), simplex(m, seed=1)) if weighted else (uniform(n), uniform(m))
    kwargs = dict(blur=blur, weights=(a, b) if weighted else None, **EXACT)
    close(potentials(x, y, **kwargs), pot(x, y, blur, a, b)[:2], 1e-7)
    T = pot_map(x, y, blur, a, b)
    close(barycentric_map(x, y, **kwargs), T, 1e-7)
    close(velocity(x, y, **kwargs), T - pot_map(x, x, blur, a, a))


def test_divergence_is_made_of_pots_values():
    x = normal(20, 2)
    y = normal(25, 2, seed=1) + 1
    a = simplex(20)
    b = simplex(25, seed=1)

    def value(x, y, a, b):
        f, g, _ = pot(x, y, .8, a, b)
        return (a @ f + b @ g).item()

    expected = value(x, y, a, b) - (value(x, x, a, a) + value(y, y, b, b))/2
    ours = divergence(x, y, .8, weights=(a, b), **EXACT).item()
    assert ours == pytest.approx(expected, abs=1e-7)


# ---- correct everywhere

def repeated(x):
    return x[torch.arange(len(x)) % max(1, len(x)//3)]


def in_one_place(x):
    return x[:1].expand_as(x).clone()


def with_outlier(x, i, size):
    "One point moved by `size` standard deviations of the cloud in every coordinate."
    x[i] += size/x.shape[1]**.5
    return x


def clusters(x, places):
    centres = normal(4, x.shape[1], seed=9)/x.shape[1]**.5
    return centres[places] + .02*x


def on_lattice(x):
    s = x.shape[1]**.5
    return (2*x*s).round()/2/s


KINDS = {  # of two clouds of scale about 1
    "normal": lambda x, y: (x, y),
    "duplicates": lambda x, y: (repeated(x), repeated(y)),
    "one place": lambda x, y: (in_one_place(x), in_one_place(y)),
    "same": lambda x, y: (x, x[torch.arange(len(y)) % len(x)].flip(0)),
    "outlier 1e3": lambda x, y: (x, with_outlier(y, len(y)//2, 1e3)),
    "outlier 1e6": lambda x, y: (with_outlier(x, len(x)//2, -1e6), y),
    "outliers": lambda x, y: (with_outlier(x, 0, 3e4), with_outlier(y, -1, -3e4)),
    "small": lambda x, y: (x, y*1e-3),
    "apart": lambda x, y: (x, y + 1e6/y.shape[1]**.5),
    "offset": lambda x, y: (x + 1e4, y + 1e4),
    "clusters": lambda x, y: (clusters(x, (torch.arange(len(x))**2 % 7) % 4),
                              clusters(y, torch.arange(len(y)) % 3 + 1)),
    "lattice": lambda x, y: (on_lattice(x), on_lattice(y)),
}
FACTORS = dict(
    kind=tuple(KINDS), n=(1, 2, 37, 256, 2048), m=(1, 3, 40, 256, 2048), d=(1, 2, 17, 784, 3072),
    blur=(1e-3, 1e-2, .1, .5, 3., 1e3), dtype=(f32, f64), orders=(None, 1, 6),
    tol=(1e-2, 1e-4, 1e-7))
CORNERS = (
    ("normal", 2048, 2048, 2, .05, f32, None, 1e-2),
    ("clusters", 2048, 2048, 1, .2, f64, 6, 1e-3),
    ("normal", 1024, 1024, 3072, .5, f32, None, 1e-3),
    ("same", 256, 256, 3072, .1, f64, 1, 1e-5),
    ("outlier 1e6", 2048, 1, 3072, 1e-3, f32, None, 1e-3),
    ("small", 1, 2048, 3072, 1e3, f64, 6, 1e-3),
    ("apart", 1, 1, 1, 1e-3, f32, None, 1e-3),
    ("one place", 1, 1, 3072, 1e3, f64, None, 1e-7),
    ("outliers", 256, 256, 2, .1, f32, None, 1e-3),
    ("apart", 256, 256, 2, .1, f32, None, 1e-3),
    ("outlier 1e6", 256, 256, 2, .3, f32, None, 1e-3),
    ("offset", 256, 256, 2, .1, f32, None, 1e-3),
)


def values_in_pairs(case):
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def pairwise(factors):
    "Few cases that together hold every pair of values of two factors, as far as size permits."
    values = list(factors.values())
    draw = random.Random(0)
    pairs = set()
    for i, j in itertools.combinations(range(len(values)), 2):
        pairs |= {(i, u, j, v) for u in values[i] for v in values[j]}
    cases = []
    for target in sorted(pairs, key=str):
        if target not in pairs:
            continue
        i, u, j, v = target
        tries = []
        for _ in range(60):
            case = [draw.choice(options) for options in values]
            case[i] = u
            case[j] = v
            if case[1]*case[2]*max(case[3], 128) <= 2**26:
                tries.append(tuple(case))
        if tries:
            cases.append(max(tries, key=lambda case: len(values_in_pairs(case) & pairs)))
            pairs -= values_in_pairs(cases[-1])
    return cases


def case_name(case):
    return "-".join(str(v).replace("torch.", "").replace(" ", "_") for v in case)


@functools.cache
def problem(kind, n, m, d, dtype, orders):
    "x, y in their dtype; weights to hand over, or None; and the weights in float64."
    x = normal(n, d)/d**.5
    y = (normal(m, d, seed=1)*.5 + .5)/d**.5
    x, y = (z.to(dtype) for z in KINDS[kind](x, y))
    if orders is None:
        return x, y, None, uniform(n), uniform(m)
    a = simplex(n, orders).to(dtype)
    b = simplex(m, orders, seed=1).to(dtype)
    return x, y, (a, b), a.double()/a.double().sum(), b.double()/b.double().sum()


def marked(case):
    large = max(case[1:3]) > 1000 and case[3] > 1000
    return pytest.param(case, id=case_name(case), marks=pytest.mark.slow if large else ())


@pytest.mark.parametrize("case", [marked(case) for case in (*pairwise(FACTORS), *CORNERS)])
def test_everywhere(case):
    """Finite, and the error that tol promises, or a warning.

    The marginals of the potentials are checked where their dtype resolves them; and always what
    marginals imply for the centre of mass: |Σ aᵢ T(xᵢ) − Σ bⱼ yⱼ| ≤ error · max ‖yⱼ − ȳ‖.
    """
    kind, n, m, d, blur, dtype, orders, tol = case
    x, y, weights, a, b = problem(kind, n, m, d, dtype, orders)
    C = exact_cost(x, y)
    spread = max(C.max() - C.min(), exact_cost(x, x).max() if n <= 300 else math.inf)
    easy = spread < 50*blur**2
    kwargs = dict(blur=blur, tol=tol, weights=weights, max_iter=2000 if easy else 150)

    def solved(call):
        (*out, info), warning = watched(call, x, y, diagnostics=True, **kwargs)
        assert all(t.dtype == dtype and t.isfinite().all() for t in out)
        error = info.error.item()
        assert math.isfinite(error) and (error > tol) == (warning is not None)
        assert warning is None or not easy
        return out, 1.02*error

    (f, g), bound = solved(potentials)
    assert f.shape == (n,) and g.shape == (m,)
    error, noise = marginal_errors(x, y, blur, f, g, a, b)
    assert noise >= .2 or error <= max(tol, bound) + noise + 1e-12

    unit = torch.finfo(dtype).eps
    far = y.double().abs().max().item()
    centre = b @ y.double()
    (T,), bound = solved(barycentric_map)
    assert T.shape == (n, d)
    T = T.double()
    assert (T >= y.amin(0) - 8*unit*far).all() and (T <= y.amax(0) + 8*unit*far).all()
    assert (a @ T - centre).norm() <= bound*radius(y) + 64*unit*d**.5*far

    (v,), bound = solved(velocity)
    assert v.shape == (n, d)
    far = max(far, x.double().abs().max().item())
    moved = a @ v.double() + a @ x.double()
    assert (moved - centre).norm() <= bound*(radius(x) + radius(y)) + 64*unit*d**.5*far


SMALL = (
    ("normal", 40, 30, 2), ("duplicates", 30, 36, 2), ("one place", 5, 4, 3), ("same", 24, 24, 2),
    ("outlier 1e3", 30, 20, 2), ("outlier 1e6", 20, 30, 3), ("outliers", 24, 24, 1),
    ("small", 20, 20, 2), ("apart", 20, 24, 2), ("offset", 20, 24, 3), ("clusters", 30, 25, 2),
    ("lattice", 30, 20, 2), ("normal", 1, 20, 2), ("normal", 20, 1, 2), ("normal", 2, 3, 784),
    ("clusters", 25, 20, 784))


@functools.cache
def truth(cloud, blur, dtype, orders):
    x, y, weights, *_ = problem(*cloud, dtype, orders)
    return exact_velocity(x, y, blur, *weights or ())


@each_dtype
@pytest.mark.parametrize("blur, tol", (
    (.03, 1e-4), (.1, 1e-3), (.1, 1e-6), (.4, 1e-2), (.4, 1e-5), (1e3, 1e-4)))
@pytest.mark.parametrize("cloud", SMALL, ids=case_name)
def test_what_tol_means_for_the_velocity(cloud, blur, tol, dtype):
    "Σ aᵢ‖v(xᵢ) − v*(xᵢ)‖ ≤ tol · (radius of x + radius of y)."
    orders = (None, 1, 5)[SMALL.index(cloud) % 3]
    x, y, weights, a, _ = problem(*cloud, dtype, orders)
    expected, remaining = truth(cloud, blur, dtype, orders)
    v, warning = watched(velocity, x, y, blur, tol=tol, weights=weights, max_iter=5000)
    hard = blur < .1 or tol < 1e-5 or cloud[0].startswith("outlier")
    assert warning is None or hard
    error = (tol if warning is None else warning[1]) + 2*remaining
    largest = max(x.double().abs().max().item(), y.double().abs().max().item())
    bound = error*(radius(x) + radius(y)) + 64*torch.finfo(dtype).eps*largest
    assert a @ (v.double() - expected).norm(dim=1) <= bound


@each_dtype
@pytest.mark.parametrize("target", ("a point", "three close points", "knots"))
def test_what_float32_does_not_resolve_is_solved_in_float64(target, dtype):
    "Knots of a few blurs, thousands of blurs apart; for the self-term a wide x is enough."
    def knots(seed):
        places = torch.linspace(-10, 10, 5)[:, None, None]
        return (places + 6e-3*normal(5, 24, 2, seed=seed)).flatten(0, 1)

    targets = {"a point": torch.zeros(1, 2), "three close points": 1e-5*normal(3, 2),
               "knots": knots(1)}
    x = knots(0).to(dtype)
    y = targets[target].to(dtype)
    blur = 3e-3
    (v, info), warning = watched(velocity, x, y, blur, tol=1e-4, diagnostics=True)
    assert warning is None and info.error <= 1e-4
    assert (v - exact_velocity(x, y, blur)[0]).norm(dim=1).mean() <= 1e-2*blur


@pytest.mark.parametrize("dtype, s", ((f32, 1e-9), (f32, 1e9), (f64, 1e-60), (f64, 1e60)), ids=str)
def test_units_do_not_matter(dtype, s):
    x = normal(30, 2, dtype=dtype)
    y = normal(20, 2, seed=1, dtype=dtype) + 1
    v, warning = watched(velocity, s*x, s*y, s*.3, tol=1e-4)
    assert warning is None
    close(v/s, velocity(x, y, .3, tol=1e-4), 2e-3)


@each_dtype
@pytest.mark.parametrize("blur", (1e-12, 1e-6, 1e6, 1e12))
def test_blur_beyond_all_scales(blur, dtype):
    "Below every distance: an assignment, to the reported error. Above: all go to the mean."
    x = normal(20, 2, dtype=dtype)
    y = normal(20, 2, seed=1, dtype=dtype) + 1
    (v, info), warning = watched(velocity, x, y, blur, max_iter=100, diagnostics=True)
    error = info.error.item()
    assert v.isfinite().all() and (warning is None) == (error <= 1e-3)
    if blur > 1:
        close(v, (y.mean(0) - x.mean(0)).expand(20, 2), 1e-5)
    else:
        centre = (x + v).mean(0) - y.mean(0)
        assert centre.norm() <= 1.02*error*(radius(x) + radius(y)) + 1e-5
    s = watched(divergence, x, y, blur, max_iter=100)[0]
    assert s.isfinite() and s.dtype == dtype


@pytest.mark.parametrize("dim", (1, 2, 50))
def test_one_point_each(dim):
    x = normal(1, dim)
    y = normal(1, dim, seed=1)
    assert_close(velocity(x, y, .1), y - x)
    assert_close(divergence(x, y, .1), (y - x).square().sum()/2)
    f, g = potentials(x, y, .1)
    assert_close(f, g)
    assert_close(f + g, cost(x, y)[0])


# ---- batches

@pytest.mark.parametrize("lead_x, lead_y", (
    ((5,), (5,)), ((2, 3), (2, 3)), ((2, 1), (3,)), ((), (4,)), ((4,), ()), ((2, 3), (1, 1))))
def test_a_batch_is_its_problems_one_by_one(lead_x, lead_y):
    x = normal(*lead_x, 12, 2)
    y = normal(*lead_y, 15, 2, seed=1) + 1
    lead = torch.broadcast_shapes(lead_x, lead_y)
    f, g = potentials(x, y, .5, **EXACT)
    v = velocity(x, y, .5, **EXACT)
    s = divergence(x, y, .5, **EXACT)
    shapes = (f.shape, g.shape, v.shape, s.shape)
    assert shapes == ((*lead, 12), (*lead, 15), (*lead, 12, 2), lead)
    x = x.expand(*lead, 12, 2)
    y = y.expand(*lead, 15, 2)
    for i in itertools.product(*(range(n) for n in lead)):
        close((f[i], g[i]), potentials(x[i], y[i], .5, **EXACT), 1e-8)
        close(v[i], velocity(x[i], y[i], .5, **EXACT), 1e-8)
        close(s[i], divergence(x[i], y[i], .5, **EXACT), 1e-8)


@pytest.mark.parametrize("self_term", ("same", "masked"))
def test_a_point_of_weight_zero_is_absent(self_term):
    x, y = normal(9, 3), normal(7, 3, seed=1) + 1
    a = torch.cat([simplex(6), uniform(3)*0])
    b = torch.cat([uniform(2)*0, simplex(5, 1, 1)])
    padded = dict(weights=(a, b), **EXACT)
    alone = dict(weights=(a[:6], b[2:]), **EXACT)
    close(divergence(x, y, .7, **padded), divergence(x[:6], y[2:], .7, **alone), 1e-7)
    for got, expected in zip(potentials(x, y, .7, **padded), potentials(x[:6], y[2:], .7, **alone)):
        kept = got[:6] if len(got) == 9 else got[2:]
        close(kept - kept[0], expected - expected[0], 1e-6)
    options = dict(self_term=self_term)
    close(velocity(x, y, .7, **padded, **options)[:6],
          velocity(x[:6], y[2:], .7, **alone, **options), 1e-6)


def test_weights_of_one_side():
    x, y, b = normal(6, 3), normal(5, 3, seed=1), simplex(5, 1, 1)
    for function in (divergence, velocity):
        both = function(x, y, .7, weights=(uniform(6), b), **EXACT)
        close(function(x, y, .7, weights=(None, b), **EXACT), both, 1e-12)
    close(divergence(x, y, .7, weights=(None, None), **EXACT), divergence(x, y, .7, **EXACT), 1e-12)


def test_weights_and_starts_broadcast_like_clouds():
    x = normal(6, 2)
    y = normal(3, 5, 2, seed=1) + 1
    a = torch.stack([simplex(6), simplex(6, seed=5)])[:, None]
    b = simplex(5, seed=1)
    kwargs = dict(blur=.5, weights=(a, b), **EXACT)
    v, (g, _) = velocity(x, y, return_init=True, **kwargs)
    s = divergence(x, y, **kwargs)
    assert v.shape == (2, 3, 6, 2)
    for i, j in itertools.product(range(2), range(3)):
        alone = dict(blur=.5, weights=(a[i, 0], b), **EXACT)
        close(v[i, j], velocity(x, y[j], **alone), 1e-8)
        close(s[i, j], divergence(x, y[j], **alone), 1e-8)
    for init in (g[:, :1], g[0], g[0, 0]):
        close(velocity(x, y, init=(init, None), **kwargs), v)


# ---- the self-term

@pytest.mark.parametrize("dtype, tol", ((f32, 1e-5), (f64, 1e-9)), ids=str)
@pytest.mark.parametrize("weighted", (False, True), ids=("uniform", "weighted"))
@pytest.mark.parametrize("n, m, d, blur", (
    (24, 30, 2, .5), (24, 16, 2, 2.), (20, 20, 50, 5.), (3, 2, 1, 1.), (12, 1, 2, 50.)))
def test_the_three_self_terms(n, m, d, blur, weighted, dtype, tol):
    x = normal(n, d, dtype=dtype)
    y = normal(m, d, seed=1, dtype=dtype)*.5 + 1
    second = normal(n + 5, d, seed=2, dtype=dtype)
    weights = (simplex(n, .5).to(dtype), simplex(m, 1, 1).to(dtype)) if weighted else None
    kwargs = dict(blur=blur, tol=tol, weights=weights, max_iter=20_000)
    exact = {"same": {}, "masked": dict(masked=True), second: dict(second=second)}
    fields = []
    for self_term, also in exact.items():
        v, warning = watched(velocity, x, y, self_term=self_term, **kwargs)
        expected, remaining = exact_velocity(x, y, blur, *weights or (), **also)
        assert warning is None and remaining < 1e-10 and v.dtype == dtype
        close(v.double(), expected, 100*tol*(1 + d**.5))
        fields.append(expected)
    for u, w in itertools.combinations(fields, 2):
        assert (u - w).abs().max() > 1e-3  # the three differ
    assert torch.equal(velocity(x, y, **kwargs), velocity(x, y, self_term="same", **kwargs))


def test_self_terms_of_a_batch():
    x = normal(2, 3, 16, 2)
    y = normal(3, 12, 2, seed=1) + 1
    second = normal(2, 1, 10, 2, seed=2)
    masked = velocity(x, y, .6, self_term="masked", **EXACT)
    independent = velocity(x, y, .6, self_term=second, **EXACT)
    for i, j in itertools.product(range(2), range(3)):
        one = x[i, j], y[j], .6
        close(masked[i, j], velocity(*one, self_term="masked", **EXACT), 1e-8)
        close(independent[i, j], velocity(*one, self_term=second[i, 0], **EXACT), 1e-8)


def test_closed_forms_of_the_self_term():
    x = normal(2, 3)
    y = normal(4, 3, seed=1)
    partners = barycentric_map(x, y, .7, **EXACT) - x.flip(0)
    close(velocity(x, y, .7, self_term="masked", **EXACT), partners, 1e-8)
    same = velocity(x, y, .7, **EXACT)
    close(velocity(x, y, .7, self_term=x.clone(), **EXACT), same, 1e-7)


@pytest.mark.parametrize("self_term, error, match", (
    ("diagonal", ValueError, "self_term.*diagonal"),
    (None, ValueError, "self_term.*None"),
    (True, ValueError, "self_term.*True"),
    (np.zeros((5, 2)), ValueError, "self_term"),
    (torch.zeros(5, 3), ValueError, "self_term.* 2 .* 3"),
    (torch.zeros(0, 2), ValueError, r"self_term.*\(0, 2\)"),
    (torch.zeros(5), ValueError, r"self_term.*\(5,\)"),
    (torch.full((5, 2), math.nan), ValueError, "self_term.*10"),
    (torch.zeros(5, 2, dtype=torch.int64), TypeError, "self_term.*int64"),
    (torch.zeros(3, 5, 2), ValueError, r"self_term.*\(3, 5, 2\)"),
), ids=("name", "None", "bool", "numpy", "features", "empty", "1D", "nan", "ints", "lead"))
def test_bad_self_terms(self_term, error, match):
    with pytest.raises(error, match=match):
        velocity(normal(5, 2), normal(4, 2, seed=1), .3, self_term=self_term)


def test_a_masked_self_term_that_cannot_be():
    "No plan without a diagonal has these marginals."
    y = normal(4, 2, seed=1)
    with pytest.raises(ValueError, match="masked.*1"):
        velocity(normal(1, 2), y, .5, self_term="masked")
    a = torch.tensor([.8, .1, .1]).double()  # a weight above 1/2
    v, warning = watched(velocity, normal(3, 2), y, .5, self_term="masked",
                         weights=(a, uniform(4)), max_iter=200)
    assert warning is not None and v.isfinite().all()


# ---- diagnostics and warnings

@pytest.mark.parametrize("call", (potentials, barycentric_map, velocity))
@pytest.mark.parametrize("lead_x, lead_y", (((), ()), ((3,), (3,)), ((2, 1), (3,)), ((), (4,))))
def test_diagnostics_of_each_problem(call, lead_x, lead_y):
    x = normal(*lead_x, 12, 2)
    y = normal(*lead_y, 15, 2, seed=1) + 1
    plain = call(x, y, .4, tol=1e-6)
    *out, info = call(x, y, .4, tol=1e-6, diagnostics=True)
    lead = torch.broadcast_shapes(lead_x, lead_y)
    assert info._fields == ("iterations", "error")
    assert info.iterations.shape == info.error.shape == lead
    assert ((info.error >= 0) & (info.error <= 1e-6)).all()
    assert ((info.iterations >= 0) & (info.iterations <= 2000)).all()
    assert_close(out[0] if len(out) == 1 else tuple(out), plain, atol=0, rtol=0)
    if call is velocity:
        v, (g, h), _ = velocity(x, y, .4, tol=1e-6, return_init=True, diagnostics=True)
        assert torch.equal(v, plain) and g.shape == (*lead, 15) and h.shape == (*lead, 12)


@each_dtype
@pytest.mark.parametrize("max_iter", (0, 1, 3, 10, 40))
def test_the_reported_error_is_true(max_iter, dtype):
    x = normal(4, 40, 2, dtype=dtype)
    y = normal(4, 40, 2, seed=1, dtype=dtype) + torch.arange(4.)[:, None, None].to(dtype)
    kwargs = dict(blur=.05, tol=1e-5, max_iter=max_iter)
    (f, g, info), warning = watched(potentials, x, y, diagnostics=True, **kwargs)
    assert warning == (max_iter, float(f"{info.error.max():.1e}"), 1e-5)
    assert (info.iterations == max_iter).all()
    w = uniform(40)
    for k in range(4):
        error, noise = marginal_errors(x[k], y[k], .05, f[k], g[k], w, w)
        reported = info.error[k].item()
        assert .5*reported - noise <= error <= 1.02*reported + noise


@pytest.mark.parametrize("call", (potentials, barycentric_map, velocity, divergence, particle_flow))
def test_the_warning_points_at_the_caller(call):
    kwargs = dict(steps=2) if call is particle_flow else {}
    with pytest.warns(UserWarning, match="max_iter=3") as caught:
        call(normal(30, 2), normal(30, 2, seed=1), .01, max_iter=3, **kwargs)
    assert {w.filename for w in caught} == {__file__}


# ---- dtypes

@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_is_solved_in_float32(dtype):
    x = normal(40, 2, dtype=dtype)
    y = normal(30, 2, seed=1, dtype=dtype) + 1
    v = velocity(x, y, .3)
    assert v.dtype == barycentric_map(x, y, .3).dtype == dtype
    assert_close(v, velocity(x.float(), y.float(), .3).to(dtype))
    f, g = potentials(x, y, .3)
    assert f.dtype == g.dtype == f32
    s = divergence(x.float(), y.float(), .3)
    assert_close(divergence(x, y, .3).float(), s, atol=2e-2, rtol=2e-2)


def test_dtype_is_that_of_x():
    x = normal(20, 2, dtype=f32)
    y = normal(20, 2, seed=1)
    assert velocity(x, y, .3).dtype == f32 and velocity(y, x, .3).dtype == f64


# ---- gradients

def test_gradients():
    "By finite differences, in points and weights, of a batch with weights for all; and v itself."
    x = normal(2, 6, 2).requires_grad_()
    y = (normal(5, 2, seed=1) + 1).requires_grad_()
    a = simplex(6).requires_grad_()
    b = simplex(5, seed=1).requires_grad_()

    def S(x, y, *weights):
        return divergence(x, y, .7, weights=weights or None, **EXACT)

    for inputs in ((x, y), (x, y, a, b)):
        assert torch.autograd.gradcheck(S, inputs, eps=1e-5, atol=1e-7, rtol=1e-4)
    gx, = torch.autograd.grad(S(x, y, a, b).sum(), x)
    close(-gx/a[:, None], velocity(x, y, .7, weights=(a, b), **EXACT), 1e-7)


def test_gradient_in_the_weights_is_the_first_variation():
    "Theorem 1 in finite dimensions, along a change that keeps the mass."
    x = normal(15, 2)
    y = normal(12, 2, seed=1) + 1
    a = simplex(15).requires_grad_()
    b = simplex(12, seed=1)
    change = normal(15, seed=2)
    change -= change.mean()
    kwargs = dict(blur=.5, **EXACT)
    grad, = torch.autograd.grad(divergence(x, y, weights=(a, b), **kwargs), a)
    f = potentials(x, y, weights=(a, b), **kwargs)[0]
    variation = f - potentials(x, x, weights=(a, a), **kwargs)[0]
    close(grad @ change, variation @ change, 1e-7)


def test_special_gradients():
    x = normal(20, 2).requires_grad_()
    y = normal(25, 2, seed=1)
    s = divergence(x, y, .3)
    assert torch.equal(s.detach(), divergence(x.detach(), y, .3))
    own, = torch.autograd.grad(divergence(x, x, .3, **EXACT), x)
    close(own, torch.zeros_like(x), 1e-9)
    first, = torch.autograd.grad(s, x, create_graph=True)
    with pytest.raises(RuntimeError):  # no second derivative
        torch.autograd.grad(first.sum(), x)


# ---- properties

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
SOLVED = dict(tol=1e-9, max_iter=20_000)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def cases(draw, max_points=8):
    "x, y, weights, blur: nasty coordinates within ±4, against which blur is not tiny."
    n = draw(st.integers(1, max_points))
    m = draw(st.integers(1, max_points))
    d = draw(st.integers(1, 3))
    elements = st.floats(-4, 4, width=32, allow_subnormal=False)
    x, y = (torch.as_tensor(draw(arrays(np.float64, (k, d), elements=elements))) for k in (n, m))
    weights = draw(st.sampled_from((None, (simplex(n, 1, n), simplex(m, 2, m)))))
    return x, y, dict(blur=draw(st.floats(1.5, 6)), weights=weights, **SOLVED)


def with_weights(kwargs, change):
    weights = kwargs["weights"]
    return {**kwargs, "weights": None if weights is None else change(*weights)}


def shuffle(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@few
@given(cases(), seeds)
def test_order_of_the_points(case, seed):
    x, y, kwargs = case
    p = shuffle(len(x), seed)
    q = shuffle(len(y), seed + 1)
    moved = with_weights(kwargs, lambda a, b: (a[p], b[q]))
    f, g = potentials(x, y, **kwargs)
    close(velocity(x[p], y[q], **moved), velocity(x, y, **kwargs)[p])
    close(divergence(x[p], y[q], **moved), divergence(x, y, **kwargs))
    close(potentials(x[p], y[q], **moved), (f[p], g[q]))


@few
@given(cases(), st.floats(-1e5, 1e5), st.floats(-1e5, 1e5))
def test_translation(case, s, t):
    x, y, kwargs = case
    v = velocity(x, y, **kwargs)
    close(velocity(x + s, y + s, **kwargs), v)
    close(divergence(x + s, y + s, **kwargs), divergence(x, y, **kwargs), 1e-5)
    close(velocity(x + s, y + t, **kwargs), v + (t - s))
    close(barycentric_map(x + s, y + t, **kwargs), barycentric_map(x, y, **kwargs) + t)


@few
@given(cases(), st.floats(-6, 6))
def test_scale(case, k):
    x, y, kwargs = case
    s = 10**k
    scaled = {**kwargs, "blur": s*kwargs["blur"]}
    close(velocity(s*x, s*y, **scaled)/s, velocity(x, y, **kwargs))
    close(divergence(s*x, s*y, **scaled)/s**2, divergence(x, y, **kwargs))
    f, g = potentials(s*x, s*y, **scaled)
    close((f/s**2, g/s**2), potentials(x, y, **kwargs))


@few
@given(cases(), seeds)
def test_rotation(case, seed):
    x, y, kwargs = case
    R = torch.linalg.qr(normal(x.shape[1], x.shape[1], seed=seed))[0]
    close(velocity(x @ R, y @ R, **kwargs), velocity(x, y, **kwargs) @ R)
    close(divergence(x @ R, y @ R, **kwargs), divergence(x, y, **kwargs))


@few
@given(cases(), seeds)
def test_nothing_moves_at_the_target(case, seed):
    x, _, kwargs = case
    p = shuffle(len(x), seed)
    same = with_weights(kwargs, lambda a, b: (a, a[p]))
    assert velocity(x, x[p], **same).abs().max() < 1e-6
    assert abs(divergence(x, x[p], **same).item()) < 1e-6


@few
@given(cases())
def test_symmetric_and_not_negative(case):
    x, y, kwargs = case
    swapped = with_weights(kwargs, lambda a, b: (b, a))
    s = divergence(x, y, **kwargs)
    assert s > -1e-7
    close(s, divergence(y, x, **swapped))
    close(potentials(y, x, **swapped), potentials(x, y, **kwargs)[::-1])


@few
@given(cases(), st.integers(1, 4), seeds)
def test_problems_of_several_scales_in_one_batch(case, size, seed):
    x, y, kwargs = case
    s = 2**normal(size, 1, 1, seed=seed)
    X = s*x
    Y = s*y + s.log()
    calls = (potentials, velocity, barycentric_map, divergence)
    for call in calls:
        together = call(X, Y, **kwargs)
        for i in range(size):
            one = tuple(t[i] for t in together) if call is potentials else together[i]
            close(one, call(X[i], Y[i], **kwargs), 1e-5)


@few
@given(cases(max_points=5), st.data())
def test_a_repeated_point_is_a_point_of_more_weight(case, data):
    x, y, kwargs = case

    def counts(z):
        draw = data.draw(st.lists(st.integers(1, 3), min_size=len(z), max_size=len(z)))
        return torch.tensor(draw)

    k = counts(x)
    m = counts(y)
    i = torch.arange(len(x)).repeat_interleave(k)
    j = torch.arange(len(y)).repeat_interleave(m)
    weighted = {**kwargs, "weights": (k.double()/k.sum(), m.double()/m.sum())}
    repeated = {**kwargs, "weights": None}
    close(velocity(x[i], y[j], **repeated), velocity(x, y, **weighted)[i])
    close(divergence(x[i], y[j], **repeated), divergence(x, y, **weighted))


@few
@given(cases())
def test_the_optimum(case):
    "Marginals of the plan, targets in the hull and around the mean, and the reference."
    x, y, kwargs = case
    a, b = kwargs["weights"] or (uniform(len(x)), uniform(len(y)))
    f, g = potentials(x, y, **kwargs)
    error, noise = marginal_errors(x, y, kwargs["blur"], f, g, a, b)
    assert error <= 1.1e-9 + noise and abs(f.mean() - g.mean()) < 1e-9
    T = barycentric_map(x, y, **kwargs)
    assert (T >= y.amin(0) - 1e-9).all() and (T <= y.amax(0) + 1e-9).all()
    close(a @ T, b @ y)
    close(velocity(x, y, **kwargs), exact_velocity(x, y, kwargs["blur"], a, b)[0])


# ---- bad input

@each_call
@pytest.mark.parametrize("bad, error, match", (
    (torch.zeros(0, 2), ValueError, r"{}.*\(0, 2\)"),
    (torch.zeros(3, 0), ValueError, r"{}.*\(3, 0\)"),
    (torch.zeros(3), ValueError, r"{}.*\(3,\)"),
    (torch.zeros(4, 2, dtype=torch.int64), TypeError, r"{0}.*int64.*{0}\.float\(\)"),
    (torch.zeros(4, 2, dtype=torch.bool), TypeError, "{}.*bool"),
    (np.zeros((4, 2)), TypeError, "{}.*ndarray"),
    ([[0., 1.]], TypeError, "{}.*list"),
    (torch.tensor([[0., 1.], [math.nan, 1.], [0., math.inf]]), ValueError, r"{}.*2.*6.*\(1, 0\)"),
), ids=("empty", "no features", "1D", "ints", "bools", "numpy", "list", "nan"))
def test_bad_points(call, bad, error, match):
    good = normal(5, 2)
    with pytest.raises(error, match="^" + match.format("x")):
        call(bad, good, .3)
    with pytest.raises(error, match="^" + match.format("y")):
        call(good, bad, .3)


@each_call
def test_clouds_that_do_not_match(call):
    with pytest.raises(ValueError, match="^y .* 2 .* 3"):
        call(normal(5, 2), normal(4, 3), .3)
    with pytest.raises((ValueError, RuntimeError)):
        call(normal(3, 5, 2), normal(2, 5, 2), .3)


@each_call
@pytest.mark.parametrize("blur", (0, -1., math.nan, math.inf, "0.1", None, True, torch.tensor(.1)),
                         ids=repr)
def test_bad_blur(call, blur):
    with pytest.raises(ValueError, match="^blur"):
        call(normal(5, 2), normal(4, 2), blur)


@each_call
@pytest.mark.parametrize("a, b, match", (
    (simplex(4), simplex(4), r"weights\[0\].* 5 .*\(4,\)"),
    (simplex(5), simplex(5), r"weights\[1\].* 4 .*\(5,\)"),
    (2*simplex(5), simplex(4), r"weights\[0\].*sum"),
    (simplex(5), torch.tensor([-.5, 1., .25, .25]), r"weights\[1\].*at least 0"),
    (torch.full((5,), math.nan), simplex(4), r"weights\[0\].*at least 0"),
), ids=("length of a", "length of b", "sum", "zero", "nan"))
def test_bad_weights(call, a, b, match):
    with pytest.raises(ValueError, match=match):
        call(normal(5, 2), normal(4, 2), .3, weights=(a, b))


@pytest.mark.parametrize("init, error, match", (
    (torch.zeros(5), ValueError, r"init.* 4 .*\(5,\)"),
    (torch.zeros(3, 4), ValueError, r"init.* 4 .*\(3, 4\)"),
    (torch.tensor([0., math.nan, 0., 0.]), ValueError, "init.*NaN"),
    (torch.tensor([0., math.inf, 0., 0.]), ValueError, "init.*infinite"),
    ([0.]*4, TypeError, "init.*list"),
), ids=("length", "lead", "nan", "inf", "list"))
def test_bad_starts(init, error, match):
    x = normal(5, 2)
    y = normal(4, 2, seed=1)
    with pytest.raises(error, match=match):
        potentials(x, y, .5, init=init)
    with pytest.raises(error, match=match):
        velocity(y, x, .5, init=(None, init))


def test_check_points_returns_good_points():
    x = normal(3, 2)
    assert check_points("x", x) is x
    assert check_points("x", x.half()).dtype == f32
    huge = torch.full((4, 2), 3e38)  # the sum overflows, the points are finite
    assert check_points("x", huge) is huge


# ---- nothing is left behind

def tensors(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in out for t in tensors(part)]


@pytest.mark.parametrize("call", FIELDS.values(), ids=FIELDS)
def test_no_graph_is_built(call):
    x = normal(2, 12, 2).requires_grad_()
    y = (normal(2, 9, 2, seed=1) + 1).requires_grad_()
    weights = (simplex(12).requires_grad_(), simplex(9, seed=1).requires_grad_())
    kwargs = dict(diagnostics=True)
    if call not in (barycentric_map, potentials):
        kwargs["return_init"] = True
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = tensors(call(x, y, .4, weights=weights, **kwargs))
        assert not saved
        (x*x).sum()
        assert saved  # so this measures something
    assert len(out) >= 3 and not any(t.requires_grad for t in out)


def torch_state():
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_autocast_enabled())


@pytest.mark.parametrize("call", (*FIELDS.values(), divergence), ids=(*FIELDS, "divergence"))
@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_the_modes_of_torch_are_left_alone(mode, call):
    x = normal(12, 2).requires_grad_()
    y = normal(9, 2, seed=1) + 1
    outside = torch_state()
    with mode():
        inside = torch_state()
        out = tensors(call(x, y, .4))
        assert torch_state() == inside
        graph = call is divergence and mode is torch.enable_grad
        assert all(t.requires_grad == graph for t in out)
        with pytest.raises(ValueError):
            call(x, y, -1.)
        assert torch_state() == inside
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning):  # an exception from within a solve
                call(x, y, .01, tol=1e-9, max_iter=1)
        assert torch_state() == inside
    assert torch_state() == outside


def test_inputs_are_left_alone():
    x = normal(2, 12, 2)
    y = normal(2, 9, 2, seed=1)
    second = normal(10, 2, seed=2)
    weights = (simplex(12), simplex(9, seed=1))
    g = normal(2, 9, seed=3)
    h = normal(2, 12, seed=4)
    h_second = normal(2, 10, seed=4)
    everything = (x, y, second, *weights, g, h, h_second)
    copies = [tensor.clone() for tensor in everything]
    rng = torch.get_rng_state()
    kwargs = dict(blur=.4, weights=weights)
    velocity(x, y, init=(g, h), **kwargs)
    velocity(x, y, init=(g, h), self_term="masked", **kwargs)
    velocity(x, y, init=(g, h_second), self_term=second, **kwargs)
    potentials(x, y, init=g, **kwargs)
    barycentric_map(x, y, init=g, **kwargs)
    divergence(x, y, **kwargs)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(everything, copies))
    assert torch.equal(rng, torch.get_rng_state())


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its memory from /proc")
def test_a_thousand_calls_leave_nothing_behind():
    x = normal(64, 2).requires_grad_()
    y = (normal(48, 2, seed=1) + 1).requires_grad_()

    def call(k):
        blur = 1 + (k % 7)/7
        velocity(x[:32 + k % 16], y, blur, tol=1e-2, return_init=True)
        divergence(x, y, blur, tol=1e-2)
        with pytest.raises(ValueError):
            velocity(x, y.detach()*math.nan, blur)

    for k in range(100):
        call(k)
    tensors_before = tensors_alive()
    memory_before = resident()
    for k in range(333):
        call(k)
    assert tensors_alive() == tensors_before
    assert resident() - memory_before < 8*2**20
