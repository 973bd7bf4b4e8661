"""The solver: streaming, slices, warm starts, memory and early exits, against float64 sums."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import (
    EXACT,
    exact_velocity,
    marginal_errors,
    normal,
    radius,
    simplex,
    uniform,
    watched,
)
from torch.testing import assert_close

from nsgf_nb import solver
from nsgf_nb.sinkhorn import barycentric_map, divergence, potentials, velocity
from nsgf_nb.solver import Problems, State, Workspace, problems_per_slice, solve

f32, f64 = torch.float32, torch.float64
each_dtype = pytest.mark.parametrize("dtype", (f32, f64), ids=str)


def close(actual, expected, atol):
    assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture
def stream(monkeypatch):
    "A function that makes the solver stream every problem from now on."
    return lambda: monkeypatch.setattr(solver, "STREAM_ABOVE", 10)


@pytest.fixture(params=(False, True), ids=("dense", "streamed"))
def maybe_stream(request, stream):
    return stream if request.param else lambda: None


def batch(*scales, n=30, m=20, dtype=f64):
    "Problems of one shape, harder with their scale."
    x = torch.stack([s*normal(n, 2, dtype=dtype) for s in scales])
    y = torch.stack([s*normal(m, 2, seed=1, dtype=dtype) for s in scales])
    a = uniform(n).to(dtype).expand(len(scales), 1, n)
    b = uniform(m).to(dtype).expand(len(scales), 1, m)
    return Problems(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True), a, b)


# ---- dense

SCALES = (1., 5., .2, 3., 1., .5, 8., 2.)


@each_dtype
def test_each_problem_leaves_when_it_is_done(dtype):
    "The batch gives each problem the solution that it has alone, in about as many iterations."
    problems = batch(*SCALES, dtype=dtype)
    tol = 1e-5 if dtype == f32 else 1e-9
    together = solve(problems, tol=tol)
    assert (together.error <= tol).all()
    for i in range(len(SCALES)):
        alone = solve(problems[i:i + 1], tol=tol)
        few = alone.iterations[0].item()
        assert few/2 - 10 <= together.iterations[i].item() <= 2*few + 10
        close(together.T[i], alone.T[0], 100*tol)
        P = torch.softmax(problems[i:i + 1].products() + together.h[i], -1)
        close(together.T[i], (P @ problems.Y[i])[0], 100*tol)
        c = problems.a[i] @ P[0]
        assert (c - problems.b[i]).abs().sum() <= tol + 1e2*torch.finfo(dtype).eps
    iterations = dict(zip(SCALES, together.iterations.tolist()))
    assert 3*iterations[.2] < iterations[8.]


def test_retired_rows_are_replaced_by_those_behind_them():
    problems = batch(1., 2., 3., 4., 5.)
    state = State(problems, problems.b.log(), problems.products())
    state.measure()
    state.retire(torch.tensor([True, False, True, False, False]))
    assert sorted(state.index.tolist()) == [1, 3, 4]
    assert torch.equal(state.P, problems.products()[state.index])
    assert torch.equal(state.b, problems.b[state.index])


def test_the_symmetric_solver_gives_the_general_solution():
    pair = batch(1., 2.)
    own = Problems(pair.X, pair.X, pair.a, pair.a)
    general = solve(own, tol=1e-10)
    own.symmetric = True
    symmetric = solve(own, tol=1e-10)
    close(symmetric.T, general.T, 1e-7)
    assert 5*symmetric.iterations.max() < general.iterations.max()


def test_the_plan_counts_as_the_identity_only_within_tol():
    "Two points, 5.4 blurs apart: the plan is the identity to 1e-6, not to 1e-10."
    x = torch.tensor([[0., 0.], [5.4, 0.]], dtype=f64)
    v = velocity(x, x.new_zeros(1, 2), 1., tol=1e-10)
    p = 1/(1 + math.exp(5.4**2/2))  # of going to the other, exact by symmetry
    close(v[:, 0], x.new_tensor([-5.4*p, -5.4*(1 - p)]), 1e-9)


# ---- slices and memory

def test_slices(monkeypatch):
    problems = batch(*SCALES[:5])
    whole = solve(problems, tol=1e-9)
    monkeypatch.setitem(solver.SLICE, "cpu", 2*30*20)
    assert problems_per_slice(problems.X, problems.Y) == 2
    sliced = solve(problems, tol=1e-9)  # two, two and one
    close(sliced.T, whole.T, 1e-7)
    assert (sliced.error <= 1e-9).all() and sliced.h.shape == whole.h.shape


def test_problems_per_slice():
    def points(n, d):
        return torch.empty(1, n, d)

    assert problems_per_slice(points(256, 2), points(128, 2)) == 2**20//(256*128)
    assert problems_per_slice(points(8, 2**14), points(8, 2**14)) == 2**20//(8*2**14)
    assert problems_per_slice(points(2**11, 2), points(2**11, 2)) == 1
    assert problems_per_slice(points(2**14, 2), points(2**14, 2)) == 1


CALLS = (
    dict(n=30, m=20, d=2), dict(n=24, m=24, d=40), dict(n=8, m=8, d=200),
    dict(n=16, m=12, d=2, self_term="masked"), dict(n=16, m=12, d=3, lead=5))


def results(workspace, n, m, d, lead=2, self_term="same", dtype=f32):
    x = normal(lead, n, d, dtype=dtype)
    y = normal(lead, m, d, seed=1, dtype=dtype) + 1
    v, init = velocity(x, y, .5, self_term=self_term, return_init=True, workspace=workspace)
    return [v, *init, velocity(x, y[0], .5, self_term=x.flip(-2), workspace=workspace)]


@each_dtype
def test_a_workspace_changes_nothing_and_holds_no_result(dtype):
    workspace = Workspace()
    first = [results(workspace, **call, dtype=dtype) for call in CALLS]
    for call, shared in zip(CALLS, first):
        for tensor, alone in zip(shared, results(None, **call, dtype=dtype)):
            assert torch.equal(tensor, alone)


def test_a_workspace_survives_inference_mode():
    workspace = Workspace()
    with torch.inference_mode():
        inferred = results(workspace, **CALLS[0])[0].clone()
    assert torch.equal(inferred, results(workspace, **CALLS[0])[0])


# ---- warm starts

def disturbed(g, h, size):
    "Named guesses of the potentials of y and of x, wrong by the given size."
    noise = normal(len(g) + len(h), seed=3, dtype=g.dtype)
    spike_g = torch.zeros_like(g)
    spike_h = torch.zeros_like(h)
    spike_g[4] = spike_h[4] = 1
    return {
        "noise": (size*noise[:len(g)], size*noise[len(g):]),
        "up": (g + size, h + size),
        "down": (g - size, h - size),
        "spike": (g + size*spike_g, h + size*spike_h),
        "pit": (g - size*spike_g, h - size*spike_h),
    }


@pytest.mark.parametrize("dtype, tol, atol", ((f32, 1e-5, 2e-3), (f64, 1e-8, 1e-5)), ids=str)
@pytest.mark.parametrize("blur", (.1, .4, 20.))
def test_from_anywhere_to_the_same_answer(blur, dtype, tol, atol, maybe_stream):
    x = normal(40, 2, dtype=dtype)
    y = normal(30, 2, seed=1, dtype=dtype) + 1
    kwargs = dict(blur=blur, tol=tol, max_iter=30_000)
    truth = exact_velocity(x, y, blur)[0]
    f, g = potentials(x, y, **kwargs)
    own = velocity(x, y, return_init=True, **kwargs)[1]
    other_cloud = normal(40, 2, seed=7, dtype=dtype)*2 - 3
    other = velocity(other_cloud, y.flip(0), blur, return_init=True)[1]
    maybe_stream()
    starts = {
        "none": None, "its own": own, "another cloud's": other, "zeros": (0*g, 0*f),
        "swapped": (f[:30], g[0].expand(40)),
        "unit": (normal(30, dtype=dtype), normal(40, dtype=dtype)),
    }
    for size in (10, 1e3):
        starts |= {f"{name} {size}": s for name, s in disturbed(*own, size*blur**2).items()}
    for name, init in starts.items():
        v, warning = watched(velocity, x, y, init=init, **kwargs)
        assert warning is None, (name, warning)
        close(v.double(), truth, atol)
        ours = potentials(x, y, init=None if init is None else init[0], **kwargs)
        close(torch.cat(ours), torch.cat([f, g]), atol*max(1, blur**2))


@each_dtype
def test_an_absurd_start_gives_the_answer_or_a_warning(dtype, maybe_stream):
    x = normal(40, 2, dtype=dtype)
    y = normal(30, 2, seed=1, dtype=dtype) + 1
    v, (g, h) = velocity(x, y, .4, tol=1e-5, return_init=True)
    maybe_stream()
    for size in (1e6, 1e9, 1e30):
        for name, (bad_g, bad_h) in disturbed(g, h, size).items():
            for init in ((bad_g, h), (g, bad_h)):
                w, warning = watched(velocity, x, y, .4, tol=1e-5, max_iter=500, init=init)
                assert warning or (w - v).abs().max() < 1e-3, (name, size)


def test_a_good_start_saves_iterations():
    x = normal(60, 2)
    y = normal(50, 2, seed=1) + 1
    kwargs = dict(blur=.15, tol=1e-7, max_iter=20_000, diagnostics=True)
    v, init, cold = velocity(x, y, return_init=True, **kwargs)
    assert velocity(x, y, init=init, **kwargs)[1].iterations <= 20 < cold.iterations
    g = potentials(x, y, **kwargs)[1]
    assert potentials(x, y, init=g, **kwargs)[2].iterations <= 20
    near = velocity(x + .01*v, y, init=init, **kwargs)[1]
    assert near.iterations < cold.iterations
    solution = velocity(x, y, .15, return_init=True, **EXACT)[1]
    _, warning = watched(velocity, x, y, .15, tol=1e-8, max_iter=0, init=solution)
    assert warning is None


# ---- streaming

@pytest.mark.parametrize("dtype, tol, atol", ((f32, 1e-5, 1e-3), (f64, 1e-10, 1e-7)), ids=str)
@pytest.mark.parametrize("weighted", (False, True), ids=("uniform", "weighted"))
@pytest.mark.parametrize("n, m, d, blur", (
    (60, 45, 2, .5), (45, 60, 20, 3.), (1, 80, 2, .3), (80, 1, 2, .3), (50, 50, 1, 1e3)))
def test_streamed_is_dense(n, m, d, blur, weighted, dtype, tol, atol, stream):
    x = normal(n, d, dtype=dtype)
    y = normal(m, d, seed=1, dtype=dtype) + 1
    second = normal(n + 3, d, seed=2, dtype=dtype)
    a, b = (simplex(n, .5), simplex(m, 2, 1)) if weighted else (uniform(n), uniform(m))
    weights = (a.to(dtype), b.to(dtype)) if weighted else None
    kwargs = dict(blur=blur, tol=tol, max_iter=20_000, weights=weights)

    def everything():
        terms = ["same", second, "masked"][:3 if n > 2 else 2]
        fields = [velocity(x, y, self_term=term, **kwargs) for term in terms]
        s = divergence(x, y, **kwargs)
        return [*fields, barycentric_map(x, y, **kwargs)], [*potentials(x, y, **kwargs), s]

    dense = everything()
    stream()
    streamed, warning = watched(everything)
    assert warning is None
    rtol = 1e-5 if dtype == f32 else 1e-9
    assert_close(streamed[0], dense[0], atol=atol, rtol=rtol)
    assert_close(streamed[1], dense[1], atol=atol*max(1, blur**2), rtol=rtol)
    f, g, info = potentials(x, y, diagnostics=True, **kwargs)
    error, noise = marginal_errors(x, y, blur, f, g, a, b)
    assert info.error <= tol and error <= 1.02*tol + noise + 1e-12
    v, init = velocity(x, y, return_init=True, **kwargs)
    close(velocity(x, y, init=init, **kwargs), v, atol)


@pytest.mark.parametrize("max_iter", (1, 2, 3, 2000))
def test_the_reported_error_of_the_self_term_is_true(max_iter, maybe_stream):
    "With a target of one point only the self-term is solved, and velocity returns its potential."
    maybe_stream()
    x = normal(40, 2)
    a = uniform(40)
    (v, (_, h), info), warning = watched(
        velocity, x, normal(1, 2, seed=1), .4, tol=1e-4, max_iter=max_iter, return_init=True,
        diagnostics=True)
    error, _ = marginal_errors(x, x, .4, h, h, a, a)
    assert .9*info.error - 1e-12 <= error <= 1.02*info.error + 1e-12
    assert (warning is None) == (error <= 1e-4)
    expected = exact_velocity(x, normal(1, 2, seed=1), .4)[0]
    assert a @ (v - expected).norm(dim=1) <= info.error*radius(x)


def test_the_reported_error_of_a_streamed_solve_is_true(stream):
    stream()
    x = normal(40, 2)
    y = normal(40, 2, seed=1) + 1
    (f, g, info), warning = watched(
        potentials, x, y, .05, tol=1e-6, max_iter=3, diagnostics=True)
    error, _ = marginal_errors(x, y, .05, f, g, uniform(40), uniform(40))
    assert warning == (3, float(f"{info.error:.1e}"), 1e-6)
    assert .5*info.error <= error <= 1.02*info.error


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    "The largest number of elements in the output of any operation."
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        sizes = [t.numel() for t in outputs if isinstance(t, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("self_term", ("same", "masked"))
def test_streaming_never_holds_the_matrix(self_term, stream):
    x = normal(2500, 2)
    y = normal(4000, 2, seed=1)*.5 + 1
    kwargs = dict(blur=2., tol=1e-6, self_term=self_term)
    with Largest() as largest:
        dense = velocity(x, y, **kwargs)
    assert largest.numel >= 2500*4000  # so this measures something
    stream()
    with Largest() as largest:
        streamed = velocity(x, y, **kwargs)
    assert largest.numel < 2500*4000/2
    close(streamed, dense, 1e-5)


CHILD = """
import json, sys, torch
from nsgf_nb.sinkhorn import velocity
torch.set_num_threads(1)
n, blur, tol = json.loads(sys.argv[1])
generator = torch.Generator().manual_seed(0)
x = torch.randn(n, 2, generator=generator)
y = torch.randn(n, 2, generator=generator)*.5 + torch.tensor([1., -1.])
v, info = velocity(x, y, blur, tol, diagnostics=True)
radii = sum((z - z.mean(0)).norm(dim=1).max().item() for z in (x, y))
centre = v.double().mean(0) - y.double().mean(0) + x.double().mean(0)
words = open("/proc/self/status").read().split()
peak = int(words[words.index("VmHWM:") + 1])*1024
finite = bool(v.isfinite().all())
print(json.dumps([peak, finite, info.error.item(), centre.norm().item()/radii]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_a_plan_of_14_gigabytes_is_solved_in_two_gibibytes():
    tol = 1e-2
    args = json.dumps([60_000, 1., tol])
    done = subprocess.run([sys.executable, "-W", "error", "-c", CHILD, args],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, finite, error, centre = json.loads(done.stdout)
    assert peak < 2*2**30 and finite and error <= tol and centre <= 1.02*tol
