"""W2, SW2, noise floor and ratio: parity with POT and SciPy, sizes, bad input."""
import math
import subprocess
import sys

import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from nsgf_nb.metrics import Estimate, noise_floor, ratio, sw2, w2

both = pytest.mark.parametrize("metric", (w2, sw2))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_w2_is_the_best_assignment():
    x, y = normal(200, 2), 1 + 2*normal(200, 2, seed=1)
    cost = torch.cdist(x.double(), y.double()).square().numpy()
    best = cost[linear_sum_assignment(cost)].mean()
    assert w2(x, y) == pytest.approx(math.sqrt(best), rel=1e-6)


def test_w2_far_from_the_origin():
    "The squares are those of the differences, not differences of squares."
    x = normal(100, 2).double() + 1e6
    assert w2(x, x + torch.tensor([3., 4.])) == pytest.approx(5, rel=1e-7)


def test_w2_says_when_pot_did_not_finish(monkeypatch):
    def emd2(*args, **kwargs):
        return 1., {"warning": "numItermax reached"}
    monkeypatch.setattr(ot, "emd2", emd2)
    with pytest.raises(RuntimeError, match="w2.*4 x 5 .*numItermax"):
        w2(normal(4, 2), normal(5, 2))


@pytest.mark.parametrize("n, m", ((40, 40), (40, 60), (7, 5), (1, 9)))
def test_sw2_is_pot_on_every_line(n, m):
    x, y = normal(n, 2).double(), 1 + 2*normal(m, 2, seed=1).double()
    squares = []
    for k in range(30):
        angle = k*math.pi/30
        line = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        squares.append(float(ot.emd2_1d((x @ line).numpy(), (y @ line).numpy())))
    assert sw2(x, y, directions=30) == pytest.approx(math.sqrt(sum(squares)/30), rel=1e-9)


def test_sw2_in_many_dimensions():
    "Directions are uniform on the sphere, and the same for the same seed."
    x, shift = normal(50, 20), normal(20, seed=1)
    expected = shift.norm().item()/math.sqrt(20)
    assert sw2(x, x + shift, directions=20_000) == pytest.approx(expected, rel=.03)
    assert sw2(x, 2*x) == sw2(x, 2*x) != sw2(x, 2*x, seed=1)


def test_sw2_of_large_samples_is_lean():
    "100,000 points a side take at most 300 MB more than importing did."
    pytest.importorskip("resource")  # not on Windows
    code = """if True:
        import resource, torch
        from nsgf_nb.metrics import sw2
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(100_000, 2, generator=g), torch.randn(100_000, 2, generator=g)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sw2(x, y, directions=30)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 300*(1024**2 if sys.platform == "darwin" else 1024)


@both
def test_metrics_are_symmetric_and_ignore_the_shape(metric):
    x, y = normal(30, 3, 4, 4), normal(20, 3, 4, 4, seed=1)
    assert isinstance(metric(x, y), float)
    assert metric(x, y) == pytest.approx(metric(y, x), rel=1e-9)
    assert metric(x, y) == metric(x.flatten(1), y.flatten(1))


@both
def test_metrics_have_no_side_effects(metric):
    x, y = normal(30, 3).requires_grad_(), normal(20, 3, seed=1)
    before = x.clone(), y.clone(), torch.get_rng_state()
    metric(x, y)
    for a, b in zip(before, (x, y, torch.get_rng_state())):
        assert torch.equal(a, b)


@both
def test_bad_input(metric):
    x, bad = normal(10, 2), normal(10, 2)
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"\by .*\(3, 1\)"):
        metric(x, bad)
    with pytest.raises(ValueError, match=r"\bx .*\(0, 2\)"):
        metric(x[:0], x)
    with pytest.raises(ValueError, match=r"\by .*\(2,\).*\(3,\)"):
        metric(x, normal(10, 3))
    with pytest.raises(ValueError, match=r"\by .*\(1, 8, 8\).*\(64,\)"):
        metric(normal(4, 1, 8, 8), normal(4, 64))
    with pytest.raises(TypeError, match=r"\bx .*int64"):
        metric(torch.zeros(10, 2, dtype=torch.int64), x)
    with pytest.raises(TypeError, match=r"\by .*ndarray"):
        metric(x, x.numpy())


def test_w2_of_too_many_points_says_what_it_needs_and_what_to_use():
    x = torch.zeros(1, 2).expand(2_000_000, 2)
    with pytest.raises(MemoryError, match=r"GiB for 4,000,000,000,000 pairs.*sw2"):
        w2(x, x)


def test_sw2_needs_a_direction():
    with pytest.raises(ValueError, match="directions.*0"):
        sw2(normal(4, 2), normal(4, 2), directions=0)


def test_noise_floor_draws_every_sample_afresh():
    seeds = []
    def draw(n, seed):
        seeds.append(seed)
        return normal(n, 2, seed=seed)
    first = noise_floor(sw2, draw, 50, pairs=8)
    assert len(set(seeds)) == 16
    assert min(seeds) >= 2**20
    assert max(seeds) < 2**31
    assert noise_floor(sw2, draw, 50, pairs=8) == first
    assert noise_floor(sw2, draw, 50, pairs=8, seed=1) != first
    with pytest.raises(ValueError, match="pairs.*0"):
        noise_floor(sw2, draw, 50, pairs=0)


def test_ratio():
    assert ratio([3.], [2.]).mean == 1.5
    assert math.isnan(ratio([3.], [2.]).se)
    assert ratio(torch.tensor([3., 3.]), [2., 2.]) == Estimate(1.5, 0.)
    assert ratio([0., 0.], [2., 2.]) == Estimate(0., 0.)  # relative errors would divide by 0
    assert str(Estimate(1.5, .25)) == "1.5000 ± 0.2500"
    with pytest.raises(ValueError, match="at least one value"):
        ratio([1.], [])
    for floors in ([0., 0.], [math.nan]):
        with pytest.raises(ValueError, match=f"floors.*{floors[0]}"):
            ratio([1.], floors)
