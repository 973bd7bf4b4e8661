"""The solver's ways for a GPU, on the CPU: whole batches, and rounds that are recorded."""
import pytest
import torch
from torch.testing import assert_close

from nsgf_nb import gpu_rounds, solver
from nsgf_nb.bench.device import OperationCount
from nsgf_nb.flow import particle_flow
from nsgf_nb.sinkhorn import barycentric_map, divergence, potentials, velocity

WAYS = ("keeping", "recorded")


@pytest.fixture
def take(monkeypatch):
    "A function that makes the solver take a way, with a stand-in for CUDA's recording."
    recordings = []

    def record(function):
        recordings.append(function)
        return function, None
    monkeypatch.setattr(gpu_rounds, "record", record)
    monkeypatch.setattr(gpu_rounds, "on_side_stream", lambda function: function())

    def take_way(way):
        monkeypatch.setattr(solver, "WHOLE_ON", () if way == "removing" else ("cpu",))
        monkeypatch.setattr(gpu_rounds, "RECORD", way == "recorded")
        return recordings
    return take_way


def cloud(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape, blur", (
    ((1, 5, 3), .5), ((7, 64, 2), .1), ((7, 64, 2), .02), ((3, 32, 64), 2.), ((40, 20, 2), .5)))
def test_velocities_agree(take, way, shape, blur):
    x, y = cloud(*shape), cloud(*shape, seed=1) + 1
    take("removing")
    expected = velocity(x, y, blur, tol=1e-5, max_iter=20_000)
    take(way)
    for _ in range(2):  # the second time in kept memory
        v = velocity(x, y, blur, tol=1e-5, max_iter=20_000)
        assert_close(v, expected, atol=2e-3*expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_problems_of_different_difficulty_all_reach_the_tolerance(take, way):
    scales = torch.tensor([1., 3., 10., 30.])[:, None, None]
    x, y = scales*cloud(4, 40, 2), scales*cloud(4, 40, 2, seed=1)
    take(way)
    f, g, diagnostics = potentials(x, y, 1., tol=1e-4, max_iter=20_000, diagnostics=True)
    assert (diagnostics.error <= 1e-4).all()
    assert diagnostics.iterations[0] < diagnostics.iterations[-1]
    P = ((f[..., None] + g[:, None] - torch.cdist(x, y).square()/2)).exp()/40**2
    assert_close(P.sum(2), torch.full((4, 40), 1/40), atol=1e-4, rtol=0)
    assert_close(P.sum(1), torch.full((4, 40), 1/40), atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_weights_absent_points_and_a_guess(take, way):
    x, y = cloud(3, 30, 2), cloud(3, 20, 2, seed=1)
    a = torch.rand(3, 30, generator=torch.Generator().manual_seed(2)) + .1
    a[:, 0] = 0
    b = torch.rand(3, 20, generator=torch.Generator().manual_seed(3)) + .1
    weights = (a/a.sum(1, keepdim=True), b/b.sum(1, keepdim=True))
    options = dict(tol=1e-5, weights=weights)
    take("removing")
    expected = barycentric_map(x, y, .3, **options)
    _, guess = potentials(x, y, .3, **options)
    take(way)
    assert_close(barycentric_map(x, y, .3, **options), expected, atol=1e-3, rtol=0)
    again, found = potentials(x, y, .3, init=guess, diagnostics=True, **options)[1:]
    assert_close(again, guess, atol=1e-3, rtol=0)
    assert (found.iterations <= 8).all()


@pytest.mark.parametrize("way", WAYS)
def test_masked_problems(take, way):
    x, y = cloud(3, 30, 2), cloud(3, 30, 2, seed=1)
    take("removing")
    expected = velocity(x, y, .5, tol=1e-5, self_term="masked")
    take(way)
    v = velocity(x, y, .5, tol=1e-5, self_term="masked")
    assert_close(v, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_that_is_lost_is_rescued(take, way):
    "Far clouds at a tiny blur leave the range of float32."
    x, y = 30*cloud(2, 30, 2), 30*cloud(2, 30, 2, seed=1) + 40
    take("removing")
    expected = potentials(x, y, .5, tol=1e-3, max_iter=50_000)[1]
    take(way)
    g = potentials(x, y, .5, tol=1e-3, max_iter=50_000)[1]
    difference = (g - expected) - (g - expected).mean(1, keepdim=True)
    assert difference.abs().max() < 1e-3*expected.abs().max()


@pytest.mark.parametrize("way", WAYS)
def test_it_stops_at_max_iter_with_a_warning(take, way):
    x, y = cloud(2, 50, 2), cloud(2, 50, 2, seed=1)
    take(way)
    with pytest.warns(UserWarning, match="stopped at max_iter=16"):
        found = potentials(x, y, .01, tol=1e-7, max_iter=16, diagnostics=True)[-1]
    assert (found.iterations <= 16 + gpu_rounds.LENGTH).all() and (found.iterations >= 16).all()


@pytest.mark.parametrize("way", WAYS)
def test_flows_and_gradients(take, way):
    x, y = cloud(4, 32, 2), cloud(4, 32, 2, seed=1)
    results = {}
    for name in ("removing", way):
        take(name)
        states = particle_flow(x, y, .2, steps=3, tol=1e-5)
        z = x.clone().requires_grad_()
        gradient, = torch.autograd.grad(divergence(z, y, .5, tol=1e-5).sum(), z)
        results[name] = states, gradient
    assert_close(*(states for states, _ in results.values()), atol=5e-3, rtol=0)
    assert_close(*(gradient for _, gradient in results.values()), atol=1e-3, rtol=0)


def test_a_shape_is_recorded_once_and_results_stay(take):
    recordings = take("recorded")
    x, y = cloud(5, 33, 2), cloud(5, 33, 2, seed=1)
    first = potentials(x, y, .05)
    copies = [u.clone() for u in first]
    for seed in range(2, 6):
        potentials(x, cloud(5, 33, 2, seed=seed), .05)
    assert len(recordings) == 1
    for u, copy in zip(first, copies):  # not in memory that later solves use
        assert torch.equal(u, copy)


def test_few_recordings_are_kept(take):
    recordings = take("recorded")
    for turn in range(2):
        for n in range(40, 41 + gpu_rounds.MOST):  # one more than are kept
            for _ in range(3):
                velocity(cloud(2, n, 2), cloud(2, n, 2, seed=1), .05, tol=1e-5)
        assert len(recordings) == (turn + 1)*(1 + gpu_rounds.MOST)


def test_a_recorded_solve_launches_little(take, monkeypatch):
    "A replay is one launch: on the CPU, its operations are not counted."
    x, y = cloud(4, 64, 2), cloud(4, 64, 2, seed=1)
    launches = {}
    for way in ("removing", "recorded"):
        take(way)

        def record(function):
            def replay():
                before = count.launches
                function()
                count.launches = before + 1
            return replay, None
        monkeypatch.setattr(gpu_rounds, "record", record)
        for _ in range(3):
            with OperationCount() as count:
                potentials(x, y, .05, tol=1e-4)
        launches[way] = count.launches
    assert launches["recorded"] < launches["removing"]/3
