"""EPT, JKO-Flow and the sliced-Wasserstein flow: closed forms, files, resuming, bad input."""
import math
import os
import signal

import pytest
import torch
from conftest import rewrite
from safetensors.torch import load_file
from torch.testing import assert_close

from nsgf_nb.bench.gradient_flows import (
    EPT,
    SLOPES,
    Chain,
    EPTConfig,
    SlicedWassersteinFlow,
    SWFConfig,
)
from nsgf_nb.bench.jko_flow import JKOFlow, JKOFlowConfig, Potential, push_forward
from nsgf_nb.metrics import sw2
from nsgf_nb.nsgf import NSGFConfig
from nsgf_nb.runs.checkpoints import LongRun, Terminated
from nsgf_nb.targets import sample_2d, source_2d
from nsgf_nb.training import seeded

TINY = {
    EPT: EPTConfig(stages=4, sample_steps=4, train_steps=9, batch_size=32, width=8, depth=2,
                   particles=64, scale="global"),
    JKOFlow: JKOFlowConfig(stages=2, sample_steps=4, train_steps=7, batch_size=32, width=8,
                           depth=2, particles=64, time_steps=2, scale="global"),
    SlicedWassersteinFlow: SWFConfig(stages=3, sample_steps=3, directions=4, quantiles=16,
                                     particles=64, scale="global"),
}
each_method = pytest.mark.parametrize("cls", TINY, ids=lambda cls: cls.__name__)
each_learner = pytest.mark.parametrize("cls", [EPT, JKOFlow], ids=lambda cls: cls.__name__)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normals(mean, scale=1., seed=5):
    "A function n -> (n, 2) that draws from a normal law."
    generator = torch.Generator().manual_seed(seed)
    return lambda n: torch.randn(n, 2, generator=generator)*scale + torch.as_tensor(mean)


def tiny(cls, data=None, source=None, loop=None, log_density=None, **settings):
    options = {} if log_density is None else dict(log_density=log_density)
    data = normal(200, 2)*2 + 3 if data is None else data
    return cls(TINY[cls], device="cpu", **settings).fit(data, source, False, loop, **options)


def same_weights(first, second):
    theirs = second.net.state_dict()
    return all(torch.equal(w, theirs[name]) for name, w in first.net.state_dict().items())


class Stopped(LongRun):
    "A long run that gets SIGTERM in one of its steps."
    def __init__(self, path, last):
        super().__init__(path)
        self.last = last

    def step(self, trainer, signals):
        if trainer.step == self.last - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(trainer, signals)


# ---- the chain

@each_method
@pytest.mark.parametrize("shape", [(2,), (1,), (2, 2)])
def test_it_is_a_velocity_model(cls, shape):
    model = tiny(cls, normal(200, *shape)*2 + 3)
    assert len(model.losses) == model.config.train_steps and model.losses.isfinite().all()
    assert set(model.seconds) == {"training"} and model.source == "normal"
    x = normal(5, *shape)
    z = model.standardizer.to_model(x)
    assert_close(model(x, .3), model.net(z, .3)*model.standardizer.scale)
    states = model.sample(6, steps=5, trajectory=True)
    assert states.shape == (6, 6, *shape)
    assert torch.equal(states[-1], model.sample(6, steps=5))
    with pytest.raises(ValueError, match="x must be of shape"):
        model.net(torch.zeros(2, 7), 0.)


@each_method
def test_each_row_has_its_own_time(cls):
    model = tiny(cls)
    x = normal(40, 2)
    t = torch.linspace(0, 1, 40)[normal(40).argsort()]
    alone = torch.cat([model.net(x[i:i + 1], t[i].item()) for i in range(40)])
    assert_close(model.net(x, t), alone)
    assert (model.net(x, 0.) - model.net(x, .99)).abs().max() > 1e-4


class Marker(torch.nn.Module):
    "A stage whose displacement shows its number and the local time."
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x, s):
        return torch.full_like(x, self.number) + 1e-3*s[:, None]


@pytest.mark.parametrize("K", [1, 3, 10, 29, 100])
@pytest.mark.parametrize("steps_per_stage", [1, 2, 5])
def test_every_euler_step_meets_its_stage(K, steps_per_stage):
    chain = Chain([Marker(k) for k in range(K)], (1,))
    for i in range(K*steps_per_stage):
        t = torch.full((2,), i/(K*steps_per_stage))
        k, part = divmod(i, steps_per_stage)
        expected = torch.full((2, 1), k + 1e-3*part/steps_per_stage)
        assert_close(chain(torch.zeros(2, 1), t)/K, expected, atol=2e-5, rtol=1e-6)


# ---- training in stages, seeds and files

@each_method
def test_one_seed_gives_one_model(cls):
    before = torch.get_rng_state()
    first = tiny(cls)
    assert torch.equal(before, torch.get_rng_state())
    assert same_weights(first, tiny(cls))
    assert not torch.equal(first.sample(5), tiny(cls, seed=1).sample(5))


@each_method
@pytest.mark.parametrize("last", [1, 2])  # within a stage and at its end, of EPT and SWF
def test_a_run_that_was_stopped_resumes_to_the_same_bits(cls, last, tmp_path):
    last += cls is JKOFlow  # its first stage has three steps
    data = normal(300, 2)
    whole = tiny(cls, data)
    with pytest.raises(Terminated, match=f"stopped after {last} of"):
        tiny(cls, data, loop=Stopped(tmp_path/"c", last))
    for _ in range(2):  # the second time, the run is complete
        resumed = tiny(cls, data, loop=LongRun(tmp_path/"c"))
        assert torch.equal(resumed.losses, whole.losses)
        assert same_weights(resumed, whole)
    with pytest.raises(ValueError, match="c is a checkpoint of another run, with data="):
        tiny(cls, data + 1, loop=LongRun(tmp_path/"c"))


@each_learner
def test_an_interrupted_training_keeps_the_finished_stages(cls):
    model = cls(TINY[cls], device="cpu")
    with pytest.raises(KeyboardInterrupt, match="stopped after 5 of"):
        model.fit(normal(200, 2), progress=False, loop=Stopped(None, 5))
    x = normal(5, 2)
    moves = [stage(x, torch.zeros(5)).abs().max() > 0 for stage in model.net.stages]
    assert moves == ([True, True, False, False] if cls is EPT else [False, True])
    assert len(model.losses) == 5 and model.sample(3).isfinite().all()


@each_method
def test_a_file_gives_back_the_model(cls, tmp_path):
    model = tiny(cls, normal(100, 2).double() + 5)
    path = tmp_path/"model.safetensors"
    model.save(path)
    loaded = cls.load(path, device="cpu")
    assert loaded.config == model.config
    assert torch.equal(loaded.sample(9, seed=3), model.sample(9, seed=3))
    other = EPT if cls is JKOFlow else JKOFlow
    with pytest.raises(ValueError, match=f"holds a model of type '{cls.__name__}'"):
        other.load(path)


def test_a_file_that_lacks_a_stage_is_refused(tmp_path):
    path = tmp_path/"model.safetensors"
    tiny(EPT).save(path)
    rewrite(path, tensors={k: None for k in load_file(path) if k.startswith("net.stages.3.")})
    with pytest.raises(ValueError, match="does not describe a whole EPT"):
        EPT.load(path)


# ---- EPT

def test_slopes_are_derivatives_of_the_divergences():
    divergences = {
        "kl": lambda r: r*r.log(),
        "js": lambda r: r*r.log() - (r + 1)*((r + 1)/2).log(),
        "pearson": lambda r: (r - 1)**2,
    }
    assert set(divergences) == set(SLOPES)
    r = torch.linspace(.1, 5, 50, dtype=torch.float64, requires_grad=True)
    for name, f in divergences.items():
        slope, = torch.autograd.grad(f(r).sum(), r)
        constant = slope - SLOPES[name](r.log())
        assert_close(constant, constant[0].expand(50), msg=name)


@pytest.mark.parametrize("divergence, step", [("kl", .2), ("js", .4), ("pearson", .04)])
def test_each_divergence_pulls_towards_the_data(divergence, step):
    model = EPT(device="cpu", stages=5, sample_steps=5, train_steps=100, batch_size=128, width=32,
                depth=2, step=step, last=step, divergence=divergence)
    model.fit(normal(1000, 2) + .5, normals([-.5, -.5]), progress=False)
    states = model.sample(1000, trajectory=True)
    assert (states[-1].mean(0) - states[0].mean(0)).min() > .15


# ---- JKO-Flow

def rough_potential(D, depth=3):
    with seeded(0):
        phi = Potential(D, JKOFlowConfig(width=16, depth=depth)).double()
        for weights in phi.parameters():
            torch.nn.init.normal_(weights, std=.3)
    return phi


@pytest.mark.parametrize("D, depth", [(1, 1), (2, 2), (2, 4), (4, 3)])
def test_the_derivatives_of_the_potential_belong_together(D, depth):
    phi = rough_potential(D, depth)
    x = normal(6, D).double().requires_grad_()
    s = torch.linspace(0, 1, 6, dtype=torch.float64).requires_grad_()
    slope, ds, laplacian = phi.derivatives(x, s)

    def gradient(y, z):
        return torch.autograd.grad(y.sum(), z, retain_graph=True)[0]

    hessian = torch.stack([gradient(slope[:, i], x) for i in range(D)], 1)
    assert_close(hessian, hessian.mT)
    assert_close(laplacian, hessian.diagonal(dim1=1, dim2=2).sum(1))
    assert_close(gradient(slope, s), gradient(ds, x).sum(1))


def test_a_quadratic_potential_scales():
    phi = rough_potential(2)
    for weights in phi.parameters():
        weights.data.zero_()
    phi.quadratic.weight.data[0, 0] = 1.  # Φ = ½x₁²: dx₁/ds = −x₁
    z, log_det, cost, _ = push_forward(phi, torch.tensor([[2., 3.]], dtype=torch.float64), 20)
    expected = torch.tensor([[2/math.e, 3.]], dtype=torch.float64)
    assert_close(z, expected, atol=1e-6, rtol=1e-6)
    assert_close(log_det.item(), -1., atol=1e-6, rtol=0)
    assert_close(cost.item(), 1 - math.exp(-2), atol=1e-5, rtol=0)  # ∫ ½ (2e^{-s})² ds


def test_sampling_reverses_the_way_of_training():
    model = tiny(JKOFlow, train_steps=60)
    y = normal(50, 2, seed=9)
    z = y
    for stage in reversed(model.net.stages):
        z = push_forward(stage, z, 16)[0]
    assert (z - y).abs().max() > .05
    back = model.sample(x0=model.standardizer.to_data(z), steps=200)
    assert_close(model.standardizer.to_model(back), y, atol=3e-2, rtol=0)


blob = normals([-2., -2.], 1.5)


def log_blob(x):
    return -((x + 2)/1.5).square().sum(1)/2 - math.log(2*math.pi*1.5**2)


def test_the_density_from_a_given_source_has_mass_one():
    model = tiny(JKOFlow, source=blob, log_density=log_blob, train_steps=40)
    side = torch.linspace(-9., 11., 120)
    density = model.log_prob(torch.cartesian_prod(side, side)).exp()
    assert abs(density.sum().item()*(side[1] - side[0]).item()**2 - 1) < .02


def test_at_rest_the_density_is_that_of_the_source():
    model = tiny(JKOFlow, source=blob, log_density=log_blob)
    for weights in model.net.parameters():
        weights.data.zero_()
    x = normal(20, 2)
    assert_close(model.log_prob(x), log_blob(x), atol=1e-4, rtol=1e-4)
    assert_close(model.sample(x0=x), x, atol=1e-5, rtol=1e-5)


def test_a_given_source_needs_its_log_density(tmp_path):
    for options in (dict(source=blob), dict(log_density=log_blob)):
        with pytest.raises(ValueError, match="log_density.*source"):
            tiny(JKOFlow, **options)
    with pytest.raises(TypeError, match="log_density.*float"):
        tiny(JKOFlow, source=blob, log_density=3.)
    with pytest.raises(ValueError, match=r"log_density.*\(16,\).*got \(16, 2\)"):
        tiny(JKOFlow, source=blob, log_density=lambda x: x)
    with pytest.raises(ValueError, match="log_density.*finite.*-inf"):
        tiny(JKOFlow, source=blob, log_density=lambda x: x[:, 0].abs()*-math.inf)

    model = tiny(JKOFlow, source=blob, log_density=log_blob)
    model.save(tmp_path/"model.safetensors")
    loaded = JKOFlow.load(tmp_path/"model.safetensors", device="cpu")
    x = normal(5, 2)
    with pytest.raises(ValueError, match="model.log_density"):
        loaded.log_prob(x)
    loaded.log_density = log_blob
    assert_close(loaded.log_prob(x), model.log_prob(x))


# ---- sliced-Wasserstein flow

def test_one_full_step_on_a_line_is_optimal_transport():
    x = normal(64, 1)*2 - 3
    y = normal(64, 1, seed=1).exp()
    model = tiny(SlicedWassersteinFlow, y, source=x, stages=1, directions=1, quantiles=64)
    moved = model.sample(x0=x.sort(0).values, steps=1)
    assert (moved.diff(dim=0) >= -1e-6).all()  # in order
    assert_close(moved, y.sort(0).values, atol=1e-5, rtol=1e-5)
    z = torch.tensor([[50.], [60.], [-50.], [-60.]])
    v = model.net(z, 0.)
    assert v[0] == v[1] and v[2] == v[3] and v.isfinite().all()  # beyond the last quantile


@pytest.mark.parametrize("step", [1., .5])
def test_orthonormal_frames_make_the_full_move(step):
    x = normal(512, 3)
    shift = torch.tensor([1., 2., 3.])
    model = tiny(SlicedWassersteinFlow, x + shift, source=x, stages=1, directions=6, quantiles=512,
                 particles=512, step=step)
    frames = model.net.stages[0].weight.view(2, 3, 3)
    assert_close(frames @ frames.mT, torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    assert_close(model.sample(x0=x, steps=1), x + step*shift, atol=1e-4, rtol=0)


def test_repeated_points_are_no_division_by_zero():
    model = tiny(SlicedWassersteinFlow, torch.ones(50, 2), source=torch.zeros(50, 2) + 3)
    assert model.sample(x0=torch.zeros(4, 2)).isfinite().all()


def test_the_settings_of_networks_follow_from_those_of_the_sliced_flow(tmp_path):
    model = tiny(SlicedWassersteinFlow, stages=1, depth=7, width=99, train_steps=5000)
    config = model.config
    assert (config.depth, config.width, config.train_steps, config.batch_size) == (1, 1, 1, 64)
    model.save(tmp_path/"model.safetensors")
    loaded = SlicedWassersteinFlow.load(tmp_path/"model.safetensors", device="cpu")
    assert torch.equal(loaded.sample(4), model.sample(4))


# ---- bad input

@each_method
def test_bad_input_is_named(cls):
    for data, error, words in ((torch.full((5, 2), math.nan), ValueError, "data.*10 NaN"),
                               ([["a"]], TypeError, "data.*list")):
        with pytest.raises(error, match=words):
            tiny(cls, data)
    with pytest.raises(TypeError, match=f"config.*{cls.Config.__name__}.*NSGFConfig"):
        cls(NSGFConfig())
    with pytest.raises(TypeError, match="blur"):
        cls(blur=3.)
    with pytest.raises(TypeError, match="stages.*many"):
        cls(stages="many")
    for settings, words in ((dict(channels=8), "channels.*8"), (dict(stages=0), "stages.*1.*0"),
                            (dict(bf16=True), "bf16"), (dict(compile=True), "compile"),
                            (dict(particles=1), "particles.*2.*1")):
        with pytest.raises(ValueError, match=words):
            cls(**settings)
    with pytest.raises(RuntimeError, match="fit"):
        cls().sample(3)


@pytest.mark.parametrize("config, settings, words", [
    (EPTConfig, dict(stages=20, train_steps=19), "train_steps.*20 stages.*19"),
    (JKOFlowConfig, dict(stages=20, train_steps=19), "train_steps.*20 stages.*19"),
    (EPTConfig, dict(divergence="tv"), "divergence.*kl, js, pearson.*tv"),
    (EPTConfig, dict(step=0.), "step.*0"),
    (EPTConfig, dict(last=0.), "last.*0"),
    (EPTConfig, dict(penalty=0.), "penalty.*0"),
    (JKOFlowConfig, dict(alpha=-1.), "alpha.*-1"),
    (SWFConfig, dict(quantiles=1), "quantiles.*2.*1"),
])
def test_settings_are_checked(config, settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


# ---- they learn

SMALL = {
    EPT: dict(stages=20, train_steps=400, batch_size=128, width=48, depth=2, step=1., last=.05,
              particles=4096),
    JKOFlow: dict(stages=2, train_steps=60, batch_size=128, width=32, particles=4096, alpha=10.,
                  time_steps=2),
    SlicedWassersteinFlow: dict(stages=20, particles=4096, quantiles=128, directions=8),
}


def log_eight_gaussians(x):
    angle = torch.arange(8)*(math.pi/4)
    means = 5*torch.stack([angle.cos(), angle.sin()], 1)
    squares = (x[:, None] - means).square().sum(-1)
    return torch.logsumexp(-squares/.2, 1) - math.log(8*2*math.pi*.1)


@each_method
@pytest.mark.parametrize("target", ["moons", "8gaussians-moons"])
def test_sw2_falls(cls, target):
    generator = torch.Generator().manual_seed(0)
    given = target == "8gaussians-moons"
    source = (lambda n: source_2d(target, n, generator)) if given else None
    options = dict(log_density=log_eight_gaussians) if given and cls is JKOFlow else {}
    model = cls(device="cpu", scale="global", **SMALL[cls])
    model.fit(lambda n: sample_2d(target, n, generator), source, False, **options)
    x0 = source_2d(target, 4000, 1) if given else model.sample(4000, 1, trajectory=True)[0]
    y = sample_2d(target, 4000, 2)
    share = sw2(model.sample(x0=x0, steps=20), y)/sw2(x0, y)
    assert share < (.25 if cls is SlicedWassersteinFlow else .6)
