"""W2, SW2, floor and ratio: parity with POT and SciPy, sizes, bad input."""
import math
import subprocess
import sys

import ot
import pytest
import torch

from nsgf_nb.data import sample_2d, source_2d
from nsgf_nb.metrics import Estimate, floor, ratio, sw2, w2

both = pytest.mark.parametrize("metric", (w2, sw2))


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_w2_is_the_best_assignment():
    from scipy.optimize import linear_sum_assignment
    x, y = source_2d("moons", 200), sample_2d("moons", 200)
    cost = torch.cdist(x.double(), y.double()).square().numpy()
    assert w2(x, y) == pytest.approx(math.sqrt(cost[linear_sum_assignment(cost)].mean()), rel=1e-6)


def test_w2_far_from_the_origin():
    "The squares are those of the differences, not differences of squares."
    x = normal(100, 2).double()
    assert w2(x + 1e6, x + 1e6 + torch.tensor([3., 4.])) == pytest.approx(5, rel=1e-7)


def test_w2_says_when_pot_did_not_finish(monkeypatch):
    monkeypatch.setattr(ot, "emd2", lambda *args, **kwargs: (1., {"warning": "numItermax reached before optimality"}))
    with pytest.raises(RuntimeError, match="w2: POT did not reach the optimum for 4 x 5 points: numItermax reached"):
        w2(normal(4, 2), normal(5, 2))


@pytest.mark.parametrize("n, m", ((40, 40), (40, 60), (7, 5), (1, 9)))
def test_sw2_is_pot_on_every_line(n, m):
    x, y = normal(n, 2).double(), 1 + 2*normal(m, 2, seed=1).double()
    angle = torch.arange(30).double()*math.pi/30
    lines = [ot.emd2_1d((x @ u).numpy(), (y @ u).numpy()) for u in torch.stack([angle.cos(), angle.sin()], 1)]
    assert sw2(x, y, directions=30) == pytest.approx(math.sqrt(sum(map(float, lines))/30), rel=1e-9)


def test_sw2_in_many_dimensions():
    "Directions are uniform on the sphere, and the same for the same seed."
    x, shift = normal(50, 20), normal(20, seed=1)
    assert sw2(x, x + shift, directions=20_000) == pytest.approx(shift.norm().item()/math.sqrt(20), rel=.03)
    assert sw2(x, 2*x) == sw2(x, 2*x) != sw2(x, 2*x, seed=1)


def test_sw2_of_large_samples_is_lean():
    "100,000 points a side: well under 1 GB more than importing took."
    pytest.importorskip("resource") # not on Windows
    code = """if True:
        import resource, torch
        from nsgf_nb.metrics import sw2
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(100_000, 2, generator=g), torch.randn(100_000, 2, generator=g)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sw2(x, y)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    used = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert used < 300*(1024**2 if sys.platform == "darwin" else 1024)


@both
def test_metrics_are_symmetric_and_shape_blind(metric):
    x, y = normal(30, 3, 4, 4), normal(20, 3, 4, 4, seed=1)
    assert metric(x, y) == pytest.approx(metric(y, x), rel=1e-9)
    assert metric(x, y) == metric(x.flatten(1), y.flatten(1))
    assert isinstance(metric(x, y), float)


@both
def test_metrics_leave_things_as_they_were(metric):
    x, y = normal(30, 3).requires_grad_(), normal(20, 3, seed=1)
    a, b, state = x.clone(), y.clone(), torch.get_rng_state()
    metric(x, y)
    assert torch.equal(x, a) and torch.equal(y, b) and torch.equal(state, torch.get_rng_state())


@both
def test_bad_input(metric):
    x, bad = normal(10, 2), normal(10, 2)
    bad[3, 1] = math.nan
    bad[5, 0] = math.inf
    with pytest.raises(ValueError, match=r"\by has 2 NaN or infinite values among 20, the first at index \(3, 1\)"):
        metric(x, bad)
    with pytest.raises(ValueError, match=r"\bx .*\(0, 2\)"):
        metric(x[:0], x)
    with pytest.raises(ValueError, match=r"y must have points of shape \(2,\) like x, got \(3,\)"):
        metric(x, normal(10, 3))
    with pytest.raises(ValueError, match=r"y must have points of shape \(1, 8, 8\) like x, got \(64,\)"):
        metric(normal(4, 1, 8, 8), normal(4, 64))
    with pytest.raises(TypeError, match=r"x\.float\(\)"):
        metric(torch.zeros(10, 2, dtype=torch.int64), x)
    with pytest.raises(TypeError, match=r"\by must be a torch\.Tensor, got ndarray"):
        metric(x, x.numpy())


def test_sw2_wants_directions():
    with pytest.raises(ValueError, match="directions: expected at least 1, got 0"):
        sw2(normal(4, 2), normal(4, 2), directions=0)


def test_floor_draws_every_sample_afresh():
    seeds = []
    def draw(n, seed):
        seeds.append(seed)
        return normal(n, 2, seed=seed)
    first = floor(sw2, draw, 50, pairs=8)
    assert len(set(seeds)) == 16 and min(seeds) >= 2**20 and max(seeds) < 2**31
    assert floor(sw2, draw, 50, pairs=8) == first != floor(sw2, draw, 50, pairs=8, seed=1)
    assert math.isnan(floor(sw2, draw, 50, pairs=1).se)
    with pytest.raises(ValueError, match="pairs: expected at least 1, got 0"):
        floor(sw2, draw, 50, pairs=0)


def test_ratio_of_what_it_may_be_given():
    assert ratio([3.], [2.]).mean == 1.5 and math.isnan(ratio([3.], [2.]).se)
    assert ratio(torch.tensor([3., 3.]), [2., 2.]) == Estimate(1.5, 0.)
    assert ratio([0., 0.], [2., 2.]) == Estimate(0., 0.) # relative errors would divide by zero
    assert str(Estimate(1.5, .25)) == "1.5000 ± 0.2500"
    for values, floors, words in (([1.], [], "at least one value"), ([1.], [0., 0.], "positive mean"), ([1.], [math.nan], "positive mean")):
        with pytest.raises(ValueError, match=words):
            ratio(values, floors)
