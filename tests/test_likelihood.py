"""Densities and the way back, against closed forms."""
import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.testing import assert_close

from nsgf_nb.flow import integrate
from nsgf_nb.flow_matching import FlowMatching
from nsgf_nb.likelihood import divergence, euler_log_prob, flow_log_prob
from nsgf_nb.targets import sample_2d

SMALL = dict(train_steps=400, batch_size=256, width=48, depth=2, device="cpu", ema=.99)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian_field(mean, std):
    "From N(0, I) to N(mean, std²) along the straight paths of independent pairs."
    def v(x, t):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1]*(x.ndim - 1))
        slope = (t*std**2 - (1 - t))/((t*std)**2 + (1 - t)**2)
        return mean + slope*(x - t*mean)
    return v


@pytest.mark.parametrize("shape", ((3,), (2, 2, 2)))
@pytest.mark.parametrize("method", ("midpoint", "heun"))
def test_a_gaussian_of_any_shape(shape, method):
    mean = normal(*shape, seed=1)
    std = normal(*shape, seed=2).exp()
    x = mean + std*normal(50, *shape)
    log_prob, error = flow_log_prob(gaussian_field(mean, std), x, method=method)
    truth = Independent(Normal(mean, std), len(shape)).log_prob(x)
    assert_close(log_prob, truth, atol=.02, rtol=0)
    assert (error == 0).all()


def test_a_source_of_ones_own():
    source = MultivariateNormal(torch.tensor([1., -1.]), torch.diag(torch.tensor([.5, 2.])))
    shift = torch.tensor([3., 0.])
    x = source.sample((20,)) + shift
    log_prob, _ = flow_log_prob(lambda x, t: shift.expand_as(x), x, source.log_prob, steps=3)
    assert_close(log_prob, source.log_prob(x - shift))


def test_hutchinsons_estimate_and_its_standard_error():
    mixing = normal(40, 40, seed=3)/40**.5

    def v(x, t):
        return torch.tanh(x @ mixing)
    x = normal(200, 40)
    exact, _ = flow_log_prob(v, x, steps=10)
    estimate, error = flow_log_prob(v, x, steps=10, probes=16)
    assert (error > 0).all()
    within = (estimate - exact).abs()/error
    assert .8 < within.square().mean().sqrt() < 1.4
    _, unknown = flow_log_prob(v, x[:2], steps=2, probes=1)
    assert unknown.isnan().all()
    again, _ = flow_log_prob(v, x, steps=10, probes=16)
    other, _ = flow_log_prob(v, x, steps=10, probes=16, seed=1)
    assert torch.equal(again, estimate) and not torch.equal(other, estimate)


def test_the_divergence_of_a_field_that_does_not_depend_on_x():
    velocity, change = divergence(lambda x, t: torch.ones_like(x), normal(4, 2), .5)
    assert (velocity == 1).all() and change.shape == (4, 1) and (change == 0).all()


@pytest.mark.parametrize("steps, power", ((1, 1.), (7, 1.), (7, 2.)))
def test_euler_steps_are_inverted_exactly(steps, power):
    mixing = normal(3, 3, seed=4)/2

    def v(x, t):
        return torch.tanh(x @ mixing)*(1 + torch.as_tensor(t).reshape(-1, 1))
    z = normal(30, 3)
    x, _ = integrate(v, z, steps, time_power=power)
    log_prob = euler_log_prob(v, x, steps=steps, time_power=power)

    def ends(z):
        return integrate.__wrapped__(v, z[None], steps, time_power=power)[0][0]
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(ends, z[i])
        expected = -z[i].square().sum()/2 - 1.5*math.log(2*math.pi) - jacobian.slogdet()[1]
        assert log_prob[i].item() == pytest.approx(expected.item(), abs=1e-3)


def test_steps_that_cannot_be_inverted_give_nan():
    log_prob = euler_log_prob(lambda x, t: -x, normal(5, 2), steps=1)  # all points go to zero
    assert log_prob.isnan().all()


# ---- of models

@pytest.fixture(scope="module")
def model():
    table = normal(3000, 3)*torch.tensor([1e-2, 1e3, 0.]) + torch.tensor([5., -7., 2.])
    return FlowMatching(**SMALL, sample_steps=20).fit(table.double(), progress=False)


@pytest.fixture(scope="module")
def table():
    return (normal(500, 3, seed=9)*torch.tensor([1e-2, 1e3, 0.])
            + torch.tensor([5., -7., 2.])).double()


def test_log_densities_are_per_unit_of_the_data(model, table):
    truth = Normal(torch.tensor([5., -7.]), torch.tensor([1e-2, 1e3]))
    expected = truth.log_prob(table[:, :2].float()).sum(1)
    log_prob = model.log_prob(table)
    assert log_prob.dtype == torch.float64
    assert (log_prob - expected).abs().mean() < .15
    assert (model.log_prob(table, discrete=True) - expected).abs().mean() < .3
    estimate, error = model.log_prob(table, probes=8, return_error=True)
    assert (estimate - log_prob).abs().mean() < 2*error.mean()
    scores = model.score_samples(table.numpy())
    assert scores.shape == (500,) and model.score(table) == pytest.approx(scores.mean())


def test_mass_one(model):
    deviation = torch.tensor([1e-2, 1e3, 0.], dtype=torch.float64)
    axis = torch.linspace(-5, 5, 60, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    points = torch.cat([grid, torch.zeros(len(grid), 1)], 1)*deviation
    points = points + torch.tensor([5., -7., 2.])
    for options in (dict(steps=50), dict(discrete=True)):
        mass = model.log_prob(points, **options).exp().sum()*(axis[1] - axis[0])**2*1e-2*1e3
        assert mass.item() == pytest.approx(1, abs=.02)


def test_there_and_back(model, table):
    z = model.encode(table)
    assert z.shape == (500, 2) and z.std(0).sub(1).abs().max() < .2
    off = (model.decode(z) - table)/torch.tensor([1e-2, 1e3, 1.])
    assert off.abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"^x .*\(n, 3\).*\(5, 2\)"):
        model.encode(torch.zeros(5, 2))


def test_there_and_back_between_eight_islands():
    data = sample_2d("8gaussians", 4000, 0)
    model = FlowMatching(**SMALL | dict(train_steps=1500)).fit(data, progress=False)
    x = data[:200]
    assert (model.decode(model.encode(x)) - x).abs().max() < 1e-4*model.standardizer.scale.max()


def test_the_model_is_differentiable(model, table):
    x = table[:4].clone().requires_grad_()
    change, = torch.autograd.grad(model(x, .3).sum(), x)
    step = torch.tensor([1e-4, 0., 0.], dtype=torch.float64)
    difference = (model(x + step, .3) - model(x - step, .3))[:, 0]/2e-4
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, .3), x)
    assert_close(jacobian[range(4), 0, range(4), 0], difference, rtol=.05, atol=.05)
    assert (change[:, :2] != 0).any() and (change[:, 2] == 0).all()
    assert not model(table, .3).requires_grad


def test_densities_need_the_normal_source():
    square = FlowMatching(**SMALL | dict(train_steps=2)).fit(
        normal(50, 2), source=lambda n: torch.rand(n, 2), progress=False)
    with pytest.raises(ValueError, match="log_prob.*source"):
        square.log_prob(normal(5, 2))


def test_images_have_densities_too():
    settings = dict(train_steps=2, batch_size=8, channels=4, mult=(1, 2), device="cpu")
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))*2 - 1
    model = FlowMatching(**settings).fit(images, progress=False)
    log_prob, error = model.log_prob(images[:3], steps=4, return_error=True)
    assert log_prob.shape == (3,) and log_prob.isfinite().all() and (error > 0).all()
