"""The Sinkhorn engine, right everywhere: held to its word by sums made here in float64, over scales, sizes, dtypes and nasty clouds."""
import functools
import gc
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torch.testing import assert_close

import nsgf_nb.sinkhorn as engine
from nsgf_nb.sinkhorn import barycentric_map, divergence, potentials, velocity

EXACT = dict(tol=1e-10, max_iter=50_000)
SAID = re.compile(r"Sinkhorn stopped at max_iter=(\d+) with a marginal error of (\S+), above tol=(\S+)")
LARGE = dict(n=100_000, blur=1., tol=1e-2)      # the child process: about a minute, mostly three passes over all pairs; cut n, or raise blur and tol, to trim it


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(n): return torch.full((n,), 1/n, dtype=torch.float64)


def simplex(n, orders=1, seed=0):
    "Weights of which the smallest are `orders` decades below the largest."
    w = 10**(-orders*torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return w/w.sum()


def heard(call, *args, **kw):
    "What a call returns, and (max_iter, error, tol) of its warning, or None; any other warning fails."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = call(*args, **kw)
    said = [SAID.search(str(w.message)) for w in caught]
    assert all(said), [str(w.message) for w in caught]
    return out, (max((tuple(map(float, s.groups())) for s in said), key=lambda s: s[1]) if said else None)


# ---- the reference: Lemma 1 written down in float64, on differences and not on a matrix product

def exact_cost(x, y, centred=True):
    "½‖x − y‖² in float64; `centred` moves each cloud to its own mean, which no barycentric map notices."
    x, y = x.double(), y.double()
    x, y = x - (x if centred else y).mean(0), y - y.mean(0)
    if x.shape[1] > 64 and len(x)*len(y) > 4096: return ((x*x).sum(1)[:, None] + (y*y).sum(1) - 2*x @ y.T).clamp_min(0)/2
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()/2


def solve(C, eps, a, b, iters=300, until=1e-13):
    "The optimal plan for any cost: plain annealed log-domain Sinkhorn, then Newton's method; and the marginal error that it is left with."
    la, lb, g = a.log(), b.log(), torch.zeros_like(b)
    e = max(C[C.isfinite()].max().item(), eps)
    while True:
        for k in range(iters if e == eps else 20):
            f = -e*torch.logsumexp((g - C)/e + lb, 1)
            g = -e*torch.logsumexp((f - C.T)/e + la, 1)
        if e == eps: break
        e = max(e/2, eps)
    u, v = f/eps + la, g/eps + lb
    def state(u, v):
        P = (u[:, None] + v - C/eps).clamp_max(50).exp()
        return P, torch.cat([a - P.sum(1), b - P.sum(0)])
    P, r = state(u, v)
    for k in range(60):
        if r.abs().sum() < until: break
        H = torch.cat([torch.cat([P.sum(1).diag(), P], 1), torch.cat([P.T, P.sum(0).diag()], 1)])
        s = H.diag().sqrt()
        step = torch.linalg.lstsq(H/s[:, None]/s, (r/s)[:, None], driver="gelsd").solution[:, 0]/s
        for t in .5**torch.arange(12.):
            Q, q = state(u + t*step[:len(a)], v + t*step[len(a):])
            if q.abs().sum() < r.abs().sum(): break
        else: break
        u, v, P, r = u + t*step[:len(a)], v + t*step[len(a):], Q, q
    return P, r.abs().sum().item()


def image(P, y):
    "Where the plan sends each row."
    y = y.double()
    return P @ (y - y.mean(0))/P.sum(1, keepdim=True) + y.mean(0)


def oracle(x, y, blur, a=None, b=None, z=None, masked=False):
    "v in float64, and the marginal error left in its two plans."
    a, b = uniform(len(x)) if a is None else a.double()/a.double().sum(), uniform(len(y)) if b is None else b.double()/b.double().sum()
    P, e1 = solve(exact_cost(x, y), blur**2, a, b)
    z, c = (x, a) if z is None else (z, uniform(len(z)))
    C = exact_cost(x, z)
    if masked: C.fill_diagonal_(math.inf)
    Q, e2 = solve(C, blur**2, a, c)
    return image(P, y) - image(Q, z), max(e1, e2)


def marginals(x, y, blur, f, g, a, b):
    """L1 errors of rows and columns of the plan that f and g define, in float64; and what the rounding of f and g alone,
    to the dtype in which they came, can have added."""
    eps, u, C = blur**2, torch.finfo(f.dtype).eps, exact_cost(x, y, centred=False)
    f, g = f.double(), g.double()
    P = ((f[:, None] + g - C)/eps + a.log()[:, None] + b.log()).clamp_max(50).exp()
    error = max((P.sum(1) - a).abs().sum().item(), (P.sum(0) - b).abs().sum().item())
    shift, cancelled = f.mean().abs() + g.mean().abs(), 2**-50*(C.amax(1).min() + C.amin(1).max())
    def noise(w, h): return w @ ((2*u*(h.abs() + shift) + cancelled)/eps).clamp_max(1).expm1()
    return error, (noise(a, f) + noise(b, g)).item()


# ---- correct everywhere

def clouds(kind, n, m, d, seed=0):
    "Two clouds of scale about 1 (root mean square distance from the mean of the bulk), in float64."
    x, y = normal(n, d, seed=2*seed)/d**.5, (normal(m, d, seed=2*seed + 1)*.5 + .5)/d**.5
    if kind == "duplicates": x, y = x[torch.arange(n) % max(1, n//3)], y[torch.arange(m) % max(1, m//3)]
    elif kind == "one place": x, y = x[:1].expand(n, d).clone(), y[:1].expand(m, d).clone()
    elif kind == "same": x, y = x, x[torch.arange(m) % n].flip(0)
    elif kind == "outlier 1e3": y[m//2] += 1e3/d**.5
    elif kind == "outlier 1e6": x[n//2] -= 1e6/d**.5
    elif kind == "outliers": x[0], y[-1] = x[0] + 3e4/d**.5, y[-1] - 3e4/d**.5
    elif kind == "small": y = y*1e-3
    elif kind == "apart": y = y + 1e6/d**.5
    elif kind == "offset": x, y = x + 1e4, y + 1e4
    elif kind == "clusters":
        centres = normal(4, d, seed=9)/d**.5
        x, y = centres[(torch.arange(n)**2 % 7) % 4] + .02*x, centres[torch.arange(m) % 3 + 1] + .02*y
    elif kind == "lattice": x, y = (2*x*d**.5).round()/2/d**.5, (2*y*d**.5).round()/2/d**.5
    else: assert kind == "normal"
    return x, y


KINDS = "normal", "duplicates", "one place", "same", "outlier 1e3", "outlier 1e6", "outliers", "small", "apart", "offset", "clusters", "lattice"
FACTORS = dict(kind=KINDS, n=(1, 2, 37, 256, 2048), m=(1, 3, 40, 256, 2048), d=(1, 2, 17, 784, 3072),
               blur=(1e-3, 1e-2, .1, .5, 3., 1e3), dtype=(torch.float32, torch.float64), orders=(None, 1, 6), tol=(1e-2, 1e-4, 1e-7))
CORNERS = (
    ("normal", 2048, 2048, 2, .05, torch.float32, None, 1e-2), ("clusters", 2048, 2048, 1, .2, torch.float64, 6, 1e-3),
    ("normal", 1024, 1024, 3072, .5, torch.float32, None, 1e-3), ("same", 256, 256, 3072, .1, torch.float64, 1, 1e-5),
    ("outlier 1e6", 2048, 1, 3072, 1e-3, torch.float32, None, 1e-3), ("small", 1, 2048, 3072, 1e3, torch.float64, 6, 1e-3),
    ("apart", 1, 1, 1, 1e-3, torch.float32, None, 1e-3), ("one place", 1, 1, 3072, 1e3, torch.float64, None, 1e-7),
    ("outliers", 256, 256, 2, .1, torch.float32, None, 1e-3), ("apart", 256, 256, 2, .1, torch.float32, None, 1e-3),
    ("outlier 1e6", 256, 256, 2, .3, torch.float32, None, 1e-3), ("offset", 256, 256, 2, .1, torch.float32, None, 1e-3),
)


def light(case): return case[1]*case[2]*max(case[3], 128) <= 2**26


def pairwise(factors):
    "Few combinations that hold every pair of values of two factors, as far as `light` lets them."
    values, draw = list(factors.values()), random.Random(0)
    pairs = {(i, u, j, v) for i, j in itertools.combinations(range(len(values)), 2) for u in values[i] for v in values[j]}
    cases = []
    def new(case): return sum((i, case[i], j, case[j]) in pairs for i, j in itertools.combinations(range(len(values)), 2))
    for target in sorted(pairs, key=str):
        if target not in pairs: continue
        i, u, j, v = target
        tries = []
        for _ in range(60):
            case = [draw.choice(vs) for vs in values]
            case[i], case[j] = u, v
            if light(case): tries.append(tuple(case))
        if not tries: continue
        cases.append(max(tries, key=new))
        pairs -= {(i, cases[-1][i], j, cases[-1][j]) for i, j in itertools.combinations(range(len(values)), 2)}
    return cases


def name(case): return "-".join(str(v).replace("torch.", "").replace(" ", "_") for v in case)


@functools.cache
def problem(kind, n, m, d, dtype, orders):
    "x and y in their dtype; weights to hand over, or None; the same as float64."
    x, y = (z.to(dtype) for z in clouds(kind, n, m, d))
    a, b = (uniform(n), uniform(m)) if orders is None else (simplex(n, orders).to(dtype), simplex(m, orders, seed=1).to(dtype))
    return x, y, None if orders is None else (a, b), a.double()/a.double().sum(), b.double()/b.double().sum()


def radius(x): return (x.double() - x.double().mean(0)).norm(dim=1).max().item()


@pytest.mark.parametrize("case", (*pairwise(FACTORS), *CORNERS), ids=name)
def test_everywhere(case):
    """No NaN, no infinity, and the error that tol promises or the warning. Checked with sums of our own: the marginals that the
    potentials give, wherever their dtype resolves f + g − C over ε; and in every case what the marginals imply for the centre of mass,
    |Σ aᵢ T(xᵢ) − Σ bⱼ yⱼ| ≤ error · max ‖yⱼ − ȳ‖."""
    kind, n, m, d, blur, dtype, orders, tol = case
    x, y, weights, a, b = problem(kind, n, m, d, dtype, orders)
    C = exact_cost(x, y)
    easy = max(C.max().item() - C.min().item(), exact_cost(x, x).max().item() if n <= 300 else math.inf) < 50*blur**2
    kw = dict(blur=blur, tol=tol, weights=weights, max_iter=2000 if easy else 150)

    (f, g, e), said = heard(potentials, x, y, diagnostics=True, **kw)
    assert f.dtype == g.dtype == dtype and f.shape == (n,) and g.shape == (m,) and f.isfinite().all() and g.isfinite().all()
    assert e.error.isfinite() and (e.error.item() > tol) == (said is not None)
    assert not (easy and said), said
    error, noise = marginals(x, y, blur, f, g, a, b)
    if noise < .2: assert error <= max(tol, 1.02*e.error.item()) + noise + 1e-12, (error, e.error.item(), noise)

    (T, e), said = heard(barycentric_map, x, y, diagnostics=True, **kw)
    u, far = torch.finfo(dtype).eps, y.double().abs().max().item()
    assert T.dtype == dtype and T.shape == (n, d) and T.isfinite().all() and (e.error.item() > tol) == (said is not None)
    T, centre = T.double(), b @ y.double()
    assert (T >= y.amin(0) - 8*u*far).all() and (T <= y.amax(0) + 8*u*far).all()
    assert (a @ T - centre).norm() <= 1.02*e.error.item()*radius(y) + 64*u*d**.5*far

    (v, e), said = heard(velocity, x, y, diagnostics=True, **kw)
    assert v.dtype == dtype and v.shape == (n, d) and v.isfinite().all() and (e.error.item() > tol) == (said is not None)
    assert not (easy and said), said
    far = max(far, x.double().abs().max().item())
    assert (a @ v.double() - centre + a @ x.double()).norm() <= 1.02*e.error.item()*(radius(x) + radius(y)) + 64*u*d**.5*far


SMALL = (("normal", 40, 30, 2), ("duplicates", 30, 36, 2), ("one place", 5, 4, 3), ("same", 24, 24, 2), ("outlier 1e3", 30, 20, 2),
         ("outlier 1e6", 20, 30, 3), ("outliers", 24, 24, 1), ("small", 20, 20, 2), ("apart", 20, 24, 2), ("offset", 20, 24, 3),
         ("clusters", 30, 25, 2), ("lattice", 30, 20, 2), ("normal", 1, 20, 2), ("normal", 20, 1, 2), ("normal", 2, 3, 784), ("clusters", 25, 20, 784))


@functools.cache
def truth(cloud, blur, dtype, orders):
    x, y, weights, *_ = problem(*cloud, dtype, orders)
    return oracle(x, y, blur, *weights or ())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("blur, tol", ((.03, 1e-4), (.1, 1e-3), (.1, 1e-6), (.4, 1e-2), (.4, 1e-5), (1e3, 1e-4)))
@pytest.mark.parametrize("cloud", SMALL, ids=name)
def test_velocity_against_float64(cloud, blur, tol, dtype):
    """What tol means for v: Σ aᵢ‖v(xᵢ) − v*(xᵢ)‖ ≤ tol · (radius of x + radius of y), a radius being the largest distance from the mean.
    (Measured: the left side stays below half of the right one, at any blur.)"""
    kind, n, m, d = cloud
    orders = (None, 1, 5)[SMALL.index(cloud) % 3]
    x, y, weights, a, b = problem(kind, n, m, d, dtype, orders)
    expected, left = truth(cloud, blur, dtype, orders)
    v, said = heard(velocity, x, y, blur, tol=tol, weights=weights, max_iter=5000)
    assert said is None or blur < .1 or tol < 1e-5 or kind.startswith("outlier"), said
    error = (tol if said is None else said[1]) + 2*left
    rounding = 64*torch.finfo(dtype).eps*max(x.double().abs().max().item(), y.double().abs().max().item())
    assert a @ (v.double() - expected).norm(dim=1) <= error*(radius(x) + radius(y)) + rounding


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("target", ("a point", "three close points", "knots"))
def test_what_float32_does_not_resolve_is_solved_in_float64(target, dtype):
    """Particles in knots of a few blurs, thousands of blurs apart: a float32 product keeps nothing of a blur. It is x that decides for the
    self-term, however narrow the target. Errors in blurs."""
    def knots(seed): return (torch.linspace(-10, 10, 5)[:, None, None] + 6e-3*normal(5, 24, 2, seed=seed)).flatten(0, 1)
    x, y, blur = knots(0), {"a point": torch.zeros(1, 2), "three close points": 1e-5*normal(3, 2), "knots": knots(1)}[target], 3e-3
    x, y = x.to(dtype), y.to(dtype)
    (v, e), said = heard(velocity, x, y, blur, tol=1e-4, diagnostics=True)
    assert said is None and e.error <= 1e-4
    assert (v - oracle(x, y, blur)[0]).norm(dim=1).mean() <= 1e-2*blur


@pytest.mark.parametrize("dtype, s", ((torch.float32, 1e-9), (torch.float32, 1e9), (torch.float64, 1e-60), (torch.float64, 1e60)), ids=str)
def test_units_do_not_matter(dtype, s):
    x, y = normal(30, 2, dtype=dtype), normal(20, 2, seed=1, dtype=dtype) + 1
    v, said = heard(velocity, s*x, s*y, s*.3, tol=1e-4)
    assert said is None
    assert_close(v/s, velocity(x, y, .3, tol=1e-4), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("blur", (1e-12, 1e-6, 1e6, 1e12))
def test_blur_beyond_all_scales(blur, dtype):
    "Below every distance: an assignment, or as near to it as the warning says. Above: everything goes to the mean."
    x, y = normal(20, 2, dtype=dtype), normal(20, 2, seed=1, dtype=dtype) + 1
    (v, e), said = heard(velocity, x, y, blur, max_iter=100, diagnostics=True)
    assert v.isfinite().all() and e.error.isfinite() and (said is None) == (e.error.item() <= 1e-3)
    if blur > 1: assert_close(v, (y.mean(0) - x.mean(0)).expand(20, 2), atol=1e-5, rtol=0)
    else: assert ((x + v).mean(0) - y.mean(0)).norm() <= 1.02*e.error.item()*(radius(x) + radius(y)) + 1e-5


# ---- the self-term

@pytest.mark.parametrize("dtype, tol", ((torch.float32, 1e-5), (torch.float64, 1e-9)), ids=str)
@pytest.mark.parametrize("orders", (None, 1), ids=("uniform", "weighted"))
@pytest.mark.parametrize("n, m, d, blur", ((24, 30, 2, .5), (24, 16, 2, 2.), (20, 20, 50, 5.), (3, 2, 1, 1.), (12, 1, 2, 50.)))
def test_the_three_self_terms(n, m, d, blur, orders, dtype, tol):
    x, y, z = normal(n, d, dtype=dtype), normal(m, d, seed=1, dtype=dtype)*.5 + 1, normal(n + 5, d, seed=2, dtype=dtype)
    weights = None if orders is None else (simplex(n, .5).to(dtype), simplex(m, orders, 1).to(dtype))
    kw = dict(blur=blur, tol=tol, weights=weights, max_iter=20_000)
    seen = []
    for self_term, also in (("same", {}), ("masked", dict(masked=True)), (z, dict(z=z))):
        v, said = heard(velocity, x, y, self_term=self_term, **kw)
        expected, left = oracle(x, y, blur, *weights or (), **also)
        assert said is None and left < 1e-10 and v.dtype == dtype
        assert_close(v.double(), expected, atol=100*tol*(1 + d**.5), rtol=0)
        seen.append(expected)
    assert_close(velocity(x, y, **kw), velocity(x, y, self_term="same", **kw), atol=0, rtol=0)
    assert min((u - w).abs().max().item() for u, w in itertools.combinations(seen, 2)) > 1e-3    # the three are not the same thing


def test_self_terms_of_a_batch():
    x, y, z = normal(2, 3, 16, 2), normal(3, 12, 2, seed=1) + 1, normal(2, 1, 10, 2, seed=2)
    for self_term in ("masked", z):
        v = velocity(x, y, .6, self_term=self_term, **EXACT)
        for i, j in itertools.product(range(2), range(3)):
            alone = self_term if self_term is not z else z[i, 0]
            assert_close(v[i, j], velocity(x[i, j], y[j], .6, self_term=alone, **EXACT), atol=1e-8, rtol=0)


def test_a_masked_pair_looks_at_its_partner():
    x, y = normal(2, 3), normal(4, 3, seed=1)
    assert_close(velocity(x, y, .7, self_term="masked", **EXACT), barycentric_map(x, y, .7, **EXACT) - x.flip(0), atol=1e-8, rtol=0)


def test_second_batch_equal_to_the_first_is_the_debiased_field():
    x, y = normal(20, 2), normal(15, 2, seed=1) + 1
    assert_close(velocity(x, y, .5, self_term=x.clone(), **EXACT), velocity(x, y, .5, **EXACT), atol=1e-7, rtol=0)


@pytest.mark.parametrize("self_term, error, words", (
    ("diagonal", ValueError, r"self_term must be .*'same'.*'masked'.*got 'diagonal'"), (None, (TypeError, ValueError), "self_term must be .*got None"),
    (True, (TypeError, ValueError), "self_term must be .*got True"), (np.zeros((5, 2)), (TypeError, ValueError), "self_term must be"),
    (torch.zeros(5, 3), ValueError, r"self_term must have 2 features like its partner, got 3"),
    (torch.zeros(0, 2), ValueError, r"self_term must be a non-empty tensor"), (torch.zeros(5), ValueError, r"self_term must be a non-empty tensor"),
    (torch.full((5, 2), math.nan), ValueError, r"self_term has 10 NaN or infinite values among 10"),
    (torch.zeros(5, 2, dtype=torch.int64), TypeError, r"self_term must hold floating-point numbers"),
), ids=("name", "None", "bool", "numpy", "features", "empty", "1D", "nan", "ints"))
def test_bad_self_terms_are_refused_by_name(self_term, error, words):
    with pytest.raises(error, match=words): velocity(normal(5, 2), normal(4, 2, seed=1), .3, self_term=self_term)


@pytest.mark.parametrize("x, a", ((normal(1, 2), None), (normal(3, 2), torch.tensor([.8, .1, .1]).double())), ids=("one point", "a weight above 1/2"))
def test_a_masked_self_term_that_cannot_be_is_not_passed_over(x, a):
    "No plan without diagonal has these marginals: refused, or finite with the warning."
    try: v, said = heard(velocity, x, normal(4, 2, seed=1), .5, self_term="masked", weights=a if a is None else (a, uniform(4)), max_iter=200)
    except ValueError as e: assert "masked" in str(e)
    else: assert said and v.isfinite().all()


# ---- diagnostics

@pytest.mark.parametrize("call", (potentials, barycentric_map, velocity))
@pytest.mark.parametrize("lead_x, lead_y", (((), ()), ((3,), (3,)), ((2, 1), (3,)), ((), (4,))))
def test_diagnostics_of_each_problem(call, lead_x, lead_y):
    x, y = normal(*lead_x, 12, 2), normal(*lead_y, 15, 2, seed=1) + 1
    plain, (*out, e) = call(x, y, .4, tol=1e-6), call(x, y, .4, tol=1e-6, diagnostics=True)
    lead = torch.broadcast_shapes(lead_x, lead_y)
    assert type(e).__name__ == "Diagnostics" and e._fields == ("iterations", "error")
    assert e.iterations.shape == e.error.shape == lead and not e.error.requires_grad
    assert (e.error <= 1e-6).all() and (e.error >= 0).all() and (e.iterations >= 0).all() and (e.iterations <= 2000).all()
    out = out[0] if len(out) == 1 else tuple(out)
    assert_close(out, plain, atol=0, rtol=0)
    if call is velocity:
        v, init, e_ = velocity(x, y, .4, tol=1e-6, return_init=True, diagnostics=True)
        assert_close((v, *e_), (plain, *e))
        assert [tuple(u.shape) for u in init] == [(*lead, 15), (*lead, 12)]


@pytest.mark.parametrize("dtype, tol", ((torch.float32, 1e-4), (torch.float64, 1e-7)), ids=str)
def test_an_easy_problem_does_not_wait_for_a_hard_one(dtype, tol):
    x, y = normal(30, 2, dtype=dtype), normal(30, 2, seed=1, dtype=dtype)
    easy, hard = (.3*x, .3*y), (2*x, 2*y)
    X, Y = (torch.stack(u) for u in zip(easy, hard, easy))
    kw = dict(tol=tol, max_iter=20_000, diagnostics=True)
    f, g, e = potentials(X, Y, .4, **kw)
    alone = [potentials(*z, .4, **kw)[2] for z in (easy, hard, easy)]
    assert (e.error <= tol).all() and e.iterations[0] == e.iterations[2] and 3*e.iterations[0] < e.iterations[1]
    for k in range(3):
        mine, its = e.iterations[k].item(), alone[k].iterations.item()
        assert its/2 - 10 <= mine <= 2*its + 10, (mine, its)
        error, noise = marginals(X[k], Y[k], .4, f[k], g[k], uniform(30), uniform(30))
        assert error <= 1.02*e.error[k].item() + noise


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("max_iter", (0, 1, 3, 10, 40))
def test_the_error_reached_is_told_and_true(max_iter, dtype):
    x, y = normal(4, 40, 2, dtype=dtype), normal(4, 40, 2, seed=1, dtype=dtype) + torch.arange(4.)[:, None, None].to(dtype)
    (f, g, e), said = heard(potentials, x, y, .05, tol=1e-5, max_iter=max_iter, diagnostics=True)
    assert said == (max_iter, float(f"{e.error.max():.1e}"), 1e-5) and (e.iterations == max_iter).all()
    for k in range(4):
        error, noise = marginals(x[k], y[k], .05, f[k], g[k], uniform(40), uniform(40))
        assert .5*e.error[k].item() - noise <= error <= 1.02*e.error[k].item() + noise
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        velocity(x, y, .05, tol=1e-5, max_iter=max_iter)
    assert 1 <= len(caught) <= 2 and all(issubclass(w.category, (UserWarning, RuntimeWarning)) for w in caught)


@pytest.mark.parametrize("stream", (False, True), ids=("dense", "streamed"))
@pytest.mark.parametrize("max_iter", (1, 2, 3, 2000))
def test_the_error_of_the_self_term_is_true(max_iter, stream, monkeypatch):
    "Against a single point there is nothing to solve but the self-term, whose potential velocity hands back."
    if stream: monkeypatch.setattr(engine, "_STREAM", 10)
    x, y, a = normal(40, 2), normal(1, 2, seed=1), uniform(40)
    (v, (g, h), e), said = heard(velocity, x, y, .4, tol=1e-4, max_iter=max_iter, return_init=True, diagnostics=True)
    error, _ = marginals(x, x, .4, h, h, a, a)
    assert .9*e.error.item() - 1e-12 <= error <= 1.02*e.error.item() + 1e-12 and (said is None) == (error <= 1e-4)
    assert a @ (v - oracle(x, y, .4)[0]).norm(dim=1) <= e.error*radius(x)


# ---- warm starts

def starts(f, g, size):
    "Named guesses of a potential of y and one of x, in a mess of the given size."
    noise, spike = normal(len(g) + len(f), seed=3, dtype=g.dtype), torch.zeros_like(g).index_fill_(0, torch.tensor(4), 1)
    spike_f = torch.zeros_like(f).index_fill_(0, torch.tensor(4), 1)
    return dict(noise=(size*noise[:len(g)], size*noise[len(g):]), up=(g + size, f + size), down=(g - size, f - size),
                spike=(g + size*spike, f + size*spike_f), pit=(g - size*spike, f - size*spike_f))


@pytest.mark.parametrize("stream", (False, True), ids=("dense", "streamed"))
@pytest.mark.parametrize("dtype, tol, atol", ((torch.float32, 1e-5, 2e-3), (torch.float64, 1e-8, 1e-5)), ids=str)
@pytest.mark.parametrize("blur", (.1, .4, 20.))
def test_from_anywhere_to_the_same_answer(blur, dtype, tol, atol, stream, monkeypatch):
    x, y = normal(40, 2, dtype=dtype), normal(30, 2, seed=1, dtype=dtype) + 1
    kw = dict(blur=blur, tol=tol, max_iter=30_000)
    truth, (f, g), own = oracle(x, y, blur)[0], potentials(x, y, **kw), velocity(x, y, return_init=True, **kw)[1]
    other = velocity(normal(40, 2, seed=7, dtype=dtype)*2 - 3, y.flip(0), blur, return_init=True)[1]
    if stream: monkeypatch.setattr(engine, "_STREAM", 10)
    inits = {"none": None, "its own": own, "another cloud's": other, "zeros": (0*g, 0*f), "swapped": (f[:30], g[0].expand(40)), "unit": (normal(30, dtype=dtype), normal(40, dtype=dtype))}
    for size in (10, 1e3): inits |= {f"{name} {size}": init for name, init in starts(*own[::-1], size*blur**2).items()}
    for name, init in inits.items():
        v, said = heard(velocity, x, y, init=init, **kw)
        assert said is None, (name, said)
        assert_close(v.double(), truth, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")
        if init is None: continue
        ours = potentials(x, y, init=init[0], **kw)
        assert_close(torch.cat(ours), torch.cat([f, g]), atol=atol*max(1, blur**2), rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("stream", (False, True), ids=("dense", "streamed"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_an_absurd_start_is_never_silently_believed(dtype, stream, monkeypatch):
    x, y = normal(40, 2, dtype=dtype), normal(30, 2, seed=1, dtype=dtype) + 1
    v, (g, h) = velocity(x, y, .4, tol=1e-5, return_init=True)
    if stream: monkeypatch.setattr(engine, "_STREAM", 10)
    for size in (1e6, 1e9, 1e30):
        for name, (gi, hi) in starts(h, g, size).items():
            for init in ((gi, h), (g, hi)):
                w, said = heard(velocity, x, y, .4, tol=1e-5, max_iter=500, init=init)
                assert said or (w - v).abs().max() < 1e-3, (name, size, init[0] is g)


def test_a_good_start_saves_iterations():
    x, y = normal(60, 2), normal(50, 2, seed=1) + 1
    kw = dict(blur=.15, tol=1e-7, max_iter=20_000, diagnostics=True)
    v, init, cold = velocity(x, y, return_init=True, **kw)
    assert velocity(x, y, init=init, **kw)[1].iterations <= 20 < cold.iterations
    assert potentials(x, y, init=potentials(x, y, **kw)[1], **kw)[2].iterations <= 20
    warm = velocity(x + .01*v, y, init=init, **kw)[1]
    assert warm.iterations < cold.iterations


# ---- large: streaming

class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    "The largest number of elements that any operation put out."
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(u.numel() for u in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(u, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("dtype, tol, atol", ((torch.float32, 1e-5, 1e-3), (torch.float64, 1e-10, 1e-7)), ids=str)
@pytest.mark.parametrize("orders", (None, 2), ids=("uniform", "weighted"))
@pytest.mark.parametrize("n, m, d, blur", ((60, 45, 2, .3), (45, 60, 20, 3.), (1, 80, 2, .3), (80, 1, 2, .3), (50, 50, 1, 1e3)))
def test_streamed_is_dense(n, m, d, blur, orders, dtype, tol, atol, monkeypatch):
    x, y, z = normal(n, d, dtype=dtype), normal(m, d, seed=1, dtype=dtype) + 1, normal(n + 3, d, seed=2, dtype=dtype)
    a, b = (uniform(n), uniform(m)) if orders is None else (simplex(n, .5), simplex(m, orders, 1))
    kw = dict(blur=blur, tol=tol, max_iter=20_000, weights=None if orders is None else (a.to(dtype), b.to(dtype)))
    def everything():
        terms = ["same", z] + ["masked"]*(n > 2)
        return [*potentials(x, y, **kw), barycentric_map(x, y, **kw), *(velocity(x, y, self_term=s, **kw) for s in terms), divergence(x, y, **kw)]
    dense = everything()
    monkeypatch.setattr(engine, "_STREAM", 10)
    streamed, said = heard(everything)
    assert said is None
    for u, w in zip(streamed, dense): assert_close(u, w, atol=atol*max(1, blur**2 if u.ndim < 2 else 1), rtol=1e-5 if dtype == torch.float32 else 1e-9)
    f, g, e = potentials(x, y, diagnostics=True, **kw)
    error, noise = marginals(x, y, blur, f, g, a, b)
    assert e.error <= tol and error <= 1.02*tol + noise + 1e-12
    v, init = velocity(x, y, return_init=True, **kw)
    assert_close(velocity(x, y, init=init, **kw), v, atol=atol, rtol=0)


@pytest.mark.parametrize("self_term", ("same", "masked"))
def test_streaming_never_holds_the_matrix(self_term, monkeypatch):
    x, y, kw = normal(2500, 2), normal(4000, 2, seed=1)*.5 + 1, dict(blur=2., tol=1e-6, self_term=self_term)
    with Largest() as most: dense = velocity(x, y, **kw)
    assert most.numel >= 2500*4000                                   # so this measures something
    monkeypatch.setattr(engine, "_STREAM", 1000)
    with Largest() as most: streamed = velocity(x, y, **kw)
    assert most.numel < 2500*4000/2, most.numel
    assert_close(streamed, dense, atol=1e-5, rtol=0)


def test_streaming_says_when_it_did_not_get_there(monkeypatch):
    monkeypatch.setattr(engine, "_STREAM", 10)
    x, y = normal(40, 2), normal(40, 2, seed=1) + 1
    (f, g, e), said = heard(potentials, x, y, .05, tol=1e-6, max_iter=3, diagnostics=True)
    error, _ = marginals(x, y, .05, f, g, uniform(40), uniform(40))
    assert said == (3, float(f"{e.error:.1e}"), 1e-6) and .5*e.error <= error <= 1.02*e.error


CHILD = """
import json, resource, sys, torch
from nsgf_nb.sinkhorn import velocity
def status(key):
    words = open("/proc/self/status").read().split()
    return int(words[words.index(key + ":") + 1])*1024
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + 4*2**30,)*2)      # fail here, not by taking the machine's memory
torch.set_num_threads(1)                   # two that wait for each other on a busy machine are slower
n, blur, tol = json.loads(sys.argv[1])
def draw(seed): return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
x, y = draw(0), draw(1)*.5 + torch.tensor([1., -1.])
v, (g, h), e = velocity(x, y, blur, tol, return_init=True, diagnostics=True)
rows = slice(None, None, n//50)
def image(z, g):
    C = torch.cdist(x[rows].double(), z.double(), compute_mode="donot_use_mm_for_euclid_dist").square()/2
    return torch.softmax((g.double() - C)/blur**2, 1) @ z.double()
reach = sum((z - z.mean(0)).norm(dim=1).max().item() for z in (x, y))
print(json.dumps(dict(peak=status("VmHWM"), finite=bool(v.isfinite().all()), error=e.error.item(), reach=reach,
    centre=(v.double().mean(0) - y.double().mean(0) + x.double().mean(0)).norm().item(),
    rows=(v[rows] - image(y, g) + image(x, h)).norm(dim=1).max().item())))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak memory from /proc, which only Linux has")
def test_a_hundred_thousand_points_in_two_gibibytes():
    args = json.dumps([LARGE["n"], LARGE["blur"], LARGE["tol"]])
    done = subprocess.run([sys.executable, "-W", "error", "-c", CHILD, args], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out, tol = json.loads(done.stdout), LARGE["tol"]
    assert out["peak"] < 2*2**30 and out["finite"] and out["error"] <= tol
    assert out["centre"] <= 1.02*tol*out["reach"] and out["rows"] <= tol*out["reach"]


# ---- nothing is left behind

FIELDS = {"velocity": velocity, "barycentric_map": barycentric_map, "potentials": potentials,
          "masked": functools.partial(velocity, self_term="masked"), "second batch": functools.partial(velocity, self_term=normal(9, 2, seed=5))}


def tensors(out): return [out] if isinstance(out, torch.Tensor) else [t for u in out for t in tensors(u)]


@pytest.mark.parametrize("call", FIELDS.values(), ids=FIELDS)
def test_no_graph_is_built(call):
    x, y = normal(2, 12, 2).requires_grad_(), (normal(2, 9, 2, seed=1) + 1).requires_grad_()
    a, b = simplex(12).requires_grad_(), simplex(9, 1, 1).requires_grad_()
    kw = dict(diagnostics=True)
    if call not in (barycentric_map, potentials): kw["return_init"] = True
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = tensors(call(x, y, .4, weights=(a, b), **kw))
        assert not saved, "a graph was recorded on the way"
        (x*x).sum()
        assert saved                                                   # so this measures something
    assert len(out) >= 3 and all(t.grad_fn is None and not t.requires_grad for t in out)
    assert x.grad is None and a.grad is None


@pytest.mark.parametrize("call", (*FIELDS.values(), divergence), ids=(*FIELDS, "divergence"))
@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_grad_mode_is_left_as_found(mode, call):
    x, y, threads, default = normal(12, 2).requires_grad_(), normal(9, 2, seed=1) + 1, torch.get_num_threads(), torch.get_default_dtype()
    def state(): return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_autocast_enabled()
    with mode():
        before = state()
        call(x, y, .4)
        assert state() == before
        with pytest.raises(ValueError): call(x, y, -1.)
        assert state() == before
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((UserWarning, RuntimeWarning)): call(x, y, .01, tol=1e-9, max_iter=1)     # an exception from within
        assert state() == before
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, default)


def resident():
    statm = Path("/proc/self/statm")
    if not statm.exists(): pytest.skip("reads its memory from /proc, which only Linux has")
    return int(statm.read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_calls_leave_nothing_behind():
    "Inputs require grad; every fifth call ends in an exception; afterwards not one tensor more, and no more memory."
    x, y = normal(64, 2).requires_grad_(), (normal(48, 2, seed=1) + 1).requires_grad_()
    def alive():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    def calls(n):
        for k in range(n):
            blur = 1 + (k % 7)/7
            if k % 5 == 4:
                with pytest.raises(ValueError): velocity(x, y.detach()*math.nan, blur)
            elif k % 5 == 3: potentials(x[:32 + k % 16], y, blur, tol=1e-2)
            elif k % 5 == 2: velocity(x, y, blur, tol=1e-2, self_term="masked", diagnostics=True)
            elif k % 5 == 1: divergence(x, y, blur, tol=1e-2)
            else: velocity(x, y, blur, tol=1e-2, return_init=True)
    calls(100)
    tensors_before, memory_before = alive(), resident()
    calls(1000)
    assert alive() == tensors_before
    assert resident() - memory_before < 8*2**20


def test_inputs_are_left_alone():
    x, y, z, a, b = normal(2, 12, 2), normal(2, 9, 2, seed=1), normal(10, 2, seed=2), simplex(12), simplex(9, 1, 1)
    init, second = (normal(2, 9, seed=3), normal(2, 12, seed=4)), (normal(2, 9, seed=3), normal(2, 10, seed=4))
    everything = x, y, z, a, b, *init, *second
    copies, state = [u.clone() for u in everything], torch.get_rng_state()
    for self_term in ("same", "masked", z): velocity(x, y, .4, weights=(a, b), init=second if self_term is z else init, self_term=self_term)
    potentials(x, y, .4, weights=(a, b), init=init[0]), barycentric_map(x, y, .4, weights=(a, b), init=init[0]), divergence(x, y, .4, weights=(a, b))
    assert all(torch.equal(u, w) for u, w in zip(everything, copies)) and torch.equal(state, torch.get_rng_state())


# ---- properties

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
SOLVED = dict(tol=1e-9, max_iter=20_000)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def cases(draw, max_points=8):
    "x, y, weights, blur: coordinates as nasty as hypothesis likes within ±4, against which blur is not tiny."
    n, m, d = draw(st.integers(1, max_points)), draw(st.integers(1, max_points)), draw(st.integers(1, 3))
    elements = st.floats(-4, 4, width=32, allow_subnormal=False)
    x, y = (torch.as_tensor(draw(arrays(np.float64, (k, d), elements=elements))) for k in (n, m))
    weights = draw(st.sampled_from((None, (simplex(n, 1, n), simplex(m, 2, m)))))
    return x, y, dict(blur=draw(st.floats(1.5, 6)), weights=weights, **SOLVED)


def swapped(kw): return {**kw, "weights": kw["weights"] and kw["weights"][::-1]}
def close(u, w, atol=1e-6): assert_close(u, w, atol=atol, rtol=0)
def shuffle(n, seed): return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@few
@given(cases(), seeds)
def test_order_of_x_is_kept_and_that_of_y_does_not_matter(case, seed):
    x, y, kw = case
    p, q = shuffle(len(x), seed), shuffle(len(y), seed + 1)
    moved = {**kw, "weights": kw["weights"] and (kw["weights"][0][p], kw["weights"][1][q])}
    close(velocity(x[p], y[q], **moved), velocity(x, y, **kw)[p])
    close(divergence(x[p], y[q], **moved), divergence(x, y, **kw))
    for u, w, r in zip(potentials(x[p], y[q], **moved), potentials(x, y, **kw), (p, q)): close(u, w[r])


@few
@given(cases(), st.floats(-1e5, 1e5), st.floats(-1e5, 1e5))
def test_translation(case, s, t):
    "One shift for both changes nothing; each its own shift adds the difference, and to S the part of the means."
    x, y, kw = case
    v, S = velocity(x, y, **kw), divergence(x, y, **kw)
    close(velocity(x + s, y + s, **kw), v)
    close(divergence(x + s, y + s, **kw), S, 1e-5)
    close(velocity(x + s, y + t, **kw), v + (t - s))
    close(barycentric_map(x + s, y + t, **kw), barycentric_map(x, y, **kw) + t)


@few
@given(cases(), st.floats(-6, 6))
def test_scale(case, k):
    x, y, kw = case
    s = 10**k
    scaled = {**kw, "blur": s*kw["blur"]}
    close(velocity(s*x, s*y, **scaled)/s, velocity(x, y, **kw))
    close(divergence(s*x, s*y, **scaled)/s**2, divergence(x, y, **kw))
    for u, w in zip(potentials(s*x, s*y, **scaled), potentials(x, y, **kw)): close(u/s**2, w)


@few
@given(cases(), seeds)
def test_rotation(case, seed):
    x, y, kw = case
    R = torch.linalg.qr(normal(x.shape[1], x.shape[1], seed=seed))[0]
    close(velocity(x @ R, y @ R, **kw), velocity(x, y, **kw) @ R)
    close(divergence(x @ R, y @ R, **kw), divergence(x, y, **kw))


@few
@given(cases(), seeds)
def test_nothing_moves_at_the_target(case, seed):
    x, _, kw = case
    p, a = shuffle(len(x), seed), kw["weights"] and kw["weights"][0]
    same = {**kw, "weights": a if a is None else (a, a[p])}
    assert velocity(x, x[p], **same).abs().max() < 1e-6 and abs(divergence(x, x[p], **same).item()) < 1e-6


@few
@given(cases())
def test_divergence_is_symmetric_and_not_negative(case):
    x, y, kw = case
    s = divergence(x, y, **kw).item()
    assert s == pytest.approx(divergence(y, x, **swapped(kw)).item(), abs=1e-6) and s > -1e-7
    f, g = potentials(x, y, **kw)
    for u, w in zip(potentials(y, x, **swapped(kw)), (g, f)): close(u, w)


@few
@given(cases(), st.integers(1, 4), seeds)
def test_a_batch_is_its_problems(case, size, seed):
    x, y, kw = case
    s = 2**normal(size, 1, 1, seed=seed)                              # problems of several scales: they end at different times
    X, Y = s*x, s*y + s.log()
    f, g = potentials(X, Y, **kw)
    v, T, S = velocity(X, Y, **kw), barycentric_map(X, Y, **kw), divergence(X, Y, **kw)
    for i in range(size):
        for u, w in zip((f[i], g[i]), potentials(X[i], Y[i], **kw)): close(u, w, 1e-5)
        close(v[i], velocity(X[i], Y[i], **kw), 1e-5), close(T[i], barycentric_map(X[i], Y[i], **kw), 1e-5), close(S[i], divergence(X[i], Y[i], **kw), 1e-5)


@few
@given(cases(max_points=5), st.data())
def test_a_point_twice_is_a_point_of_twice_the_weight(case, data):
    x, y, kw = case
    k, l = (torch.tensor(data.draw(st.lists(st.integers(1, 3), min_size=len(z), max_size=len(z)))) for z in (x, y))
    i, j = (torch.arange(len(u)).repeat_interleave(u) for u in (k, l))
    weighted = {**kw, "weights": (k.double()/k.sum(), l.double()/l.sum())}
    repeated = {**kw, "weights": None}
    close(velocity(x[i], y[j], **repeated), velocity(x, y, **weighted)[i])
    close(divergence(x[i], y[j], **repeated), divergence(x, y, **weighted))


@few
@given(cases(), seeds)
def test_what_the_optimum_is(case, seed):
    "Marginals of the plan; targets within the hull and around the mean; the oracle."
    x, y, kw = case
    a, b = kw["weights"] or (uniform(len(x)), uniform(len(y)))
    f, g = potentials(x, y, **kw)
    error, noise = marginals(x, y, kw["blur"], f, g, a, b)
    T, (v, _) = barycentric_map(x, y, **kw), oracle(x, y, kw["blur"], a, b)
    assert error <= 1.1e-9 + noise and abs(f.mean() - g.mean()) < 1e-9
    assert (T >= y.amin(0) - 1e-9).all() and (T <= y.amax(0) + 1e-9).all()
    close(a @ T, b @ y), close(velocity(x, y, **kw), v)
