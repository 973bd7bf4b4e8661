"""The generator of one call: its velocity, its trainer, what it refuses."""
import math
import signal
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nsgf_nb import one_step
from nsgf_nb.image_metrics import Classifier, frechet_distance
from nsgf_nb.images import load_images
from nsgf_nb.metrics import w2
from nsgf_nb.mlp import MLP
from nsgf_nb.one_step import (
    DiversityWatch,
    GeneratorNet,
    GeneratorTrainer,
    SinkhornGenerator,
    batch_velocity,
    kernel_velocity,
)
from nsgf_nb.runs.checkpoints import LongRun
from nsgf_nb.sinkhorn import velocity
from nsgf_nb.targets import sample_2d

TINY = dict(train_steps=40, batch_size=64, width=16, depth=2, device="cpu")
quiet = pytest.mark.filterwarnings("ignore:the samples are less diverse")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("self_term", ("independent", "masked", "same"))
def test_each_half_is_the_second_sample_of_the_other(self_term):
    x, y = normal(40, 2), normal(40, 2, seed=1) + 2
    v = batch_velocity(x, y, .3, self_term, tol=1e-4)
    second = {"independent": x[1::2]}.get(self_term, self_term)
    assert_close(v[0::2], velocity(x[0::2], y[0::2], .3, 1e-4, self_term=second))
    second = {"independent": x[0::2]}.get(self_term, self_term)
    assert_close(v[1::2], velocity(x[1::2], y[1::2], .3, 1e-4, self_term=second))


def test_the_gradient_is_that_of_the_divergence():
    "With the same batch as self-term, a step of training is a gradient step on S_ε."
    from nsgf_nb.sinkhorn import divergence
    net = MLP(width=16, depth=2)
    z, y = normal(60, 2), normal(60, 2, seed=1)/2 + 1
    x = z + net(z, 0.)
    (x - (x.detach() + velocity(x.detach(), y, .5, 1e-6))).square().sum(1).mean().backward()
    ours = [w.grad.clone() for w in net.parameters()]
    net.zero_grad()
    (2*divergence(z + net(z, 0.), y, .5, tol=1e-6)).backward()
    for a, w in zip(ours, net.parameters()):
        assert_close(a, w.grad, atol=2e-4, rtol=2e-3)


def test_kernel_means_by_hand():
    x, y, second = normal(5, 3), normal(7, 3, seed=1), normal(6, 3, seed=2)
    expected = []
    for i in range(5):
        k = (-(x[i] - y).norm(dim=1)/.7).exp()
        q = (-(x[i] - second).norm(dim=1)/.7).exp()
        expected.append((k[:, None]*y).sum(0)/k.sum() - (q[:, None]*second).sum(0)/q.sum())
    assert_close(kernel_velocity(x, y, .7, self_term=second), torch.stack(expected))
    with pytest.raises(ValueError, match="self_term"):
        kernel_velocity(x, y, .7, self_term="masked")


@pytest.mark.parametrize("D", (1, 2, 64))
def test_far_noise_is_drawn_back_and_near_noise_is_not(D):
    net = GeneratorNet(MLP((D,), width=8, depth=1), D)
    z = normal(500, D)
    z = z/z.norm(dim=1, keepdim=True)*net.radius
    near, far = .9*z, 5*z
    assert_close(near + net(near, 0.), near + net.net(near, 0.))
    assert_close(far + net(far, 0.), z + net.net(z, 0.), atol=1e-4, rtol=1e-4)
    net.radius.fill_(math.inf)
    assert_close(net(far, 0.), net.net(far, 0.))
    assert net(torch.zeros(1, D), 0.).isfinite().all()
    net.residual = False
    assert_close(far + net(far, 0.), net.net(far, 0.), atol=1e-4, rtol=1e-4)


def test_samples_of_a_law_have_the_diversity_of_other_samples():
    data = sample_2d("8gaussians", 1000, seed=0)
    watch = DiversityWatch(data)
    same = watch.measure(sample_2d("8gaussians", 1000, seed=1))
    assert all(.6 < value < 1.5 for value in same)
    line = data*torch.tensor([1., 1e-3])
    assert watch.measure(line).dimension < .6
    assert watch.measure(data[data[:, 0] > 0]).cells == 0
    assert watch.measure(torch.zeros(100, 2))[:3] == (0, 0, 0)


@quiet
@pytest.mark.parametrize("shape, settings", (
    ((3,), {}), ((2, 5), {}), ((1, 4, 4), {}), ((1, 4, 4), dict(residual_blocks=True)),
    ((3, 8, 4), dict(residual_blocks=True, maps=5)), ((1, 4, 4), dict(channels=4, mult=(1,)))))
def test_any_shape_goes_in_and_comes_out(shape, settings, tmp_path):
    model = SinkhornGenerator(**TINY, **settings).fit(normal(100, *shape), progress=False)
    x = model.sample(7, seed=3)
    assert x.shape == (7, *shape) and x.isfinite().all()
    model.save(tmp_path/"model.safetensors")
    loaded = SinkhornGenerator.load(tmp_path/"model.safetensors", "cpu")
    assert torch.equal(loaded.sample(7, seed=3), x)
    _, calls = model.sample(7, return_nfe=True)
    assert calls.tolist() == [1]*7


@quiet
def test_it_learns_the_moons_in_a_few_hundred_steps():
    data = sample_2d("moons", 4000, seed=0)
    model = SinkhornGenerator(train_steps=400, batch_size=512, width=64, depth=3, device="cpu")
    before = SinkhornGenerator(**TINY | dict(train_steps=1)).fit(data, progress=False)
    model.fit(data, progress=False)
    fresh = sample_2d("moons", 1000, seed=1)
    assert w2(model.sample(1000), fresh) < .4*w2(before.sample(1000), fresh)
    assert [step for step, *_ in model.diversity] == list(range(8, 401, 8))


def test_blur_falls_and_then_stays():
    c = SinkhornGenerator(first_blur=1., blur=.01, blur_fall=.5, **TINY).config
    trainer = GeneratorTrainer(MLP(width=8, depth=1), (), 100, c, [])
    blurs = []
    for trainer.step in (0, 25, 50, 99):
        blurs.append(trainer.blur())
    assert blurs == pytest.approx([1., .1, .01, .01])


@quiet
@pytest.mark.parametrize("settings", (dict(), dict(drop_condition=.2)))
def test_classes_move_within_themselves(settings):
    x = normal(400, 2)/4 + torch.tensor([3., 0.])
    x[200:, 0] -= 6
    labels = ["right"]*200 + ["left"]*200
    model = SinkhornGenerator(**TINY | dict(train_steps=300, width=32) | settings)
    model.fit(x, progress=False, condition=labels)
    samples = model.sample(100, condition=["right", "left"]*50)
    assert (samples[0::2, 0] > 0).float().mean() > .95
    assert (samples[1::2, 0] < 0).float().mean() > .95


@quiet
def test_numbers_as_condition():
    c = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat([4*c, normal(1000, 1)/10], 1)
    model = SinkhornGenerator(**TINY | dict(train_steps=300, batch_size=256, width=32))
    model.fit(x, progress=False, condition=c)
    for value in (.2, .8):
        samples = model.sample(200, condition=numpy.full((200, 1), value))
        assert abs(samples[:, 0].mean() - 4*value) < .4


@quiet
def test_features_are_what_moves():
    "A generator that sees |x| alone learns the distances from 0, and not the sides."
    x = normal(500, 1).abs() + 1
    model = SinkhornGenerator(**TINY | dict(train_steps=300, width=32), scale="none")
    model.fit(x, progress=False, features=[torch.abs, torch.square])
    samples = model.sample(500)
    assert abs(samples.abs().mean() - x.mean()) < .15
    assert (samples < 0).float().mean() > .3


@pytest.mark.parametrize("features, error", (
    (3, TypeError), ([torch.abs, "pixels"], TypeError), (lambda x: x[:3], ValueError),
    (lambda x: x/0, ValueError)))
def test_features_are_checked(features, error):
    with pytest.raises(error, match="features"):
        SinkhornGenerator(**TINY).fit(normal(50, 2), progress=False, features=features)


@quiet
def test_a_checkpoint_of_other_features_is_not_resumed(tmp_path):
    path = tmp_path/"run.checkpoint"
    data = normal(200, 2)
    SinkhornGenerator(**TINY).fit(data, progress=False, features=torch.sin, loop=LongRun(path))
    SinkhornGenerator(**TINY).fit(data, progress=False, features=torch.sin, loop=LongRun(path))
    for other in (torch.cos, None):
        with pytest.raises(ValueError, match="features"):
            SinkhornGenerator(**TINY).fit(data, progress=False, features=other, loop=LongRun(path))


@pytest.mark.parametrize("classes", (0, 3))
def test_samples_of_the_step_before_are_the_second_sample(classes):
    settings = dict(TINY, self_term="previous", first_blur=.3, blur=.3, tol=1e-4)
    config = SinkhornGenerator(**settings).config
    net = GeneratorNet(MLP(width=8, depth=1, classes=classes), 2)
    trainer = GeneratorTrainer(net, (), 10, config, [(torch.cos, 1.), (torch.sin, .5)])
    given = [torch.arange(60) % classes] if classes else []
    groups = given[0] if classes else torch.zeros(60)
    z, y = normal(2, 60, 2), normal(2, 60, 2, seed=1) + 2
    before, x = (torch.sin(u + net(u, torch.zeros(60), *given).detach())/.5 for u in z)
    goal = torch.sin(y[1])/.5
    trainer.distance_to_moved(net, z[0], torch.zeros(60), y[0], *given)
    v = trainer.velocities(x, goal, groups, 1)
    for group in groups.unique():
        rows = groups == group
        expected = velocity(x[rows], goal[rows], .3, 1e-4, self_term=before[rows])
        assert_close(v[rows], expected)
    trainer.distance_to_moved(net, z[1], torch.zeros(60), y[1], *given)
    assert_close(trainer.previous["1"], x)


@quiet
@pytest.mark.parametrize("drop", (0., .5))
def test_the_step_before_goes_with_classes_and_numbers(drop):
    classes = torch.arange(300) % 3
    condition = {"class": classes.numpy(), "number": normal(300).numpy()}
    settings = dict(TINY, train_steps=200, self_term="previous", drop_condition=drop, blur=.3)
    data = normal(300, 2, seed=1) + 5*classes[:, None]
    model = SinkhornGenerator(**settings).fit(data, progress=False, condition=condition)
    for k in range(3):
        x = model.sample(200, condition={"class": k, "number": 0.})
        assert (x.mean() - 5*k).abs() < 1


@pytest.mark.parametrize("self_term", ("independent", "previous"))
@quiet
def test_a_stopped_training_resumes_to_the_bit(tmp_path, self_term):
    class Stop(LongRun):
        def __call__(self, trainer, *args):
            following = type(trainer).__next__

            class Stopping(type(trainer)):
                def __next__(self):
                    if self.step == 17:
                        signal.raise_signal(signal.SIGINT)
                    return following(self)
            trainer.__class__ = Stopping
            return super().__call__(trainer, *args)

    settings = dict(TINY, self_term=self_term)
    data = sample_2d("moons", 500, seed=0)
    whole = SinkhornGenerator(**settings).fit(data, progress=False)
    path = tmp_path/"run.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        SinkhornGenerator(**settings).fit(data, progress=False, loop=Stop(path))
    assert LongRun(path).steps_done() == 18
    resumed = SinkhornGenerator(**settings).fit(data, progress=False, loop=LongRun(path))
    assert torch.equal(resumed.sample(50), whole.sample(50))
    assert resumed.diversity == whole.diversity
    again = SinkhornGenerator(**settings).fit(data, progress=False, loop=LongRun(path))
    assert torch.equal(again.sample(50), whole.sample(50))


def test_a_collapsing_generator_warns_once():
    class Point(nn.Module):
        "A generator of a single point."
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, z, t):
            return self.weight - z

    data = sample_2d("8gaussians", 400, seed=0)
    batches = ((normal(64, 2, seed=k), torch.zeros(64), data[:64]) for k in range(100))
    trainer = GeneratorTrainer(Point(), batches, 100, SinkhornGenerator(**TINY).config,
                               [(lambda x: x, 1.)], DiversityWatch(data))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(trainer)
    messages = [str(w.message) for w in caught if "less diverse" in str(w.message)]
    assert len(messages) == 1 and "variance 0.00" in messages[0]


def test_shipped_weights_make_digits_in_one_call():
    model = SinkhornGenerator.from_pretrained("digits-one-call", device="cpu")
    x, nfe = model.sample(3000, return_nfe=True)
    assert x.shape == (3000, 1, 8, 8) and nfe.tolist() == [1]*3000
    assert x.abs().max() < 1.0001  # it was clipped while it learned
    classifier = Classifier.from_pretrained("digits")
    logits = classifier(x)
    assert (logits.softmax(1).amax(1) > .9).double().mean() > .9  # of real ones .98
    assert logits.argmax(1).bincount(minlength=10).min() > 200
    distance = frechet_distance(x, load_images("digits"), classifier.features)
    assert distance < 1.5  # one that was clipped only afterwards had 2.5


def test_shipped_weights_make_mnist_in_one_call():
    model = SinkhornGenerator.from_pretrained("mnist-one-call", device="cpu")
    x = model.sample(500)
    assert x.shape == (500, 1, 28, 28) and x.abs().max() < 1.0001
    logits = Classifier.from_pretrained("mnist")(x)
    assert (logits.softmax(1).amax(1) > .9).double().mean() > .85  # of real ones .986
    assert logits.argmax(1).bincount(minlength=10).min() > 25


def test_shipped_weights_make_the_digit_that_is_asked_for():
    model = SinkhornGenerator.from_pretrained("mnist-classes-one-call", device="cpu")
    asked = torch.arange(500) % 10
    x = model.sample(500, condition=asked)
    logits = Classifier.from_pretrained("mnist")(x)
    assert (logits.argmax(1) == asked).double().mean() > .95
    assert (logits.softmax(1).amax(1) > .9).double().mean() > .94  # of real ones .986
    assert model.sample(20).shape == (20, 1, 28, 28)  # classes as often as in the data


def test_what_a_map_cannot_do_is_refused():
    model = SinkhornGenerator(**TINY)
    with pytest.raises(ValueError, match="sample_steps"):
        SinkhornGenerator(sample_steps=5)
    with pytest.raises(ValueError, match="train_steps"):
        SinkhornGenerator(train_steps=0)
    with pytest.raises(ValueError, match="channels must be 0, got 8"):
        SinkhornGenerator(residual_blocks=True, channels=8)
    with pytest.raises(ValueError, match="residual_blocks must be True for maps=8"):
        SinkhornGenerator(maps=8)
    with pytest.raises(ValueError, match=r"multiples of 4, got samples of shape \(1, 4, 6\)"):
        SinkhornGenerator(**TINY, residual_blocks=True, maps=8).fit(normal(50, 1, 4, 6))
    with pytest.raises(RuntimeError, match="fit"):
        model.sample(3)
    with pytest.raises(ValueError, match="steps must be 1, got 5"):
        model.sample(3, steps=5)
    assert not any(hasattr(model, name) for name in ("encode", "decode", "log_prob", "score"))


def test_a_class_needs_rows_for_two_halves():
    x = normal(100, 2)
    with pytest.raises(ValueError, match="batch_size must be at least"):
        SinkhornGenerator(**TINY | dict(batch_size=20)).fit(x, condition=list(range(10))*10,
                                                            progress=False)


@quiet
@pytest.mark.parametrize("settings", (
    {}, dict(residual_blocks=True), dict(residual_blocks=True, maps=4),
    dict(channels=4, mult=(1,)), dict(flip=True, channels=4, mult=(1,))))
def test_samples_stay_within_the_data(settings, tmp_path):
    data = normal(100, 1, 4, 4).clamp(-.5, 1.5)
    data[:, 0, 0, :2] = .25  # constant
    model = SinkhornGenerator(**TINY, **settings, within_data=True).fit(data, progress=False)
    if settings.get("flip"):
        data = torch.cat([data, data.flip(-1)])
    for w in model.net.net.parameters():
        w.mul_(3)  # what it has learned lies far outside, now
    model.save(tmp_path/"model.safetensors", half=True)
    for m in (model, SinkhornGenerator.load(tmp_path/"model.safetensors", "cpu")):
        x = m.sample(500)
        assert (x >= data.amin(0) - 1e-5).all() and (x <= data.amax(0) + 1e-5).all()
        assert ((x - data.amax(0)).abs() < 1e-5).any()


@quiet
def test_the_velocity_is_solved_in_full_precision(monkeypatch):
    "Also where the network runs under autocast: the solver's products need all digits."
    seen = []

    def batch(x, y, *options):
        seen.append((x.dtype, y.dtype, (x @ y.mT).dtype))
        return batch_velocity(x, y, *options)
    monkeypatch.setattr(one_step, "batch_velocity", batch)
    model = SinkhornGenerator(**TINY | dict(train_steps=2), bf16=True)
    model.fit(normal(100, 3), features=nn.Linear(3, 5).requires_grad_(False), progress=False)
    assert set(seen) == {(torch.float32,)*3}


@quiet
@pytest.mark.parametrize("data, condition, asked", (
    (lambda n: torch.rand(n, 3), None, None),
    (torch.rand(200, 3), [0, 1]*100, 0),
    (torch.rand(200, 3), torch.rand(200, 1), .5),
))
def test_any_data_can_bound_the_samples(data, condition, asked):
    model = SinkhornGenerator(**TINY, within_data=True)
    model.fit(data, progress=False, condition=condition)
    for w in model.net.net.parameters():
        w.mul_(3)
    x = model.sample(300, condition=asked)
    assert x.min() >= -1e-4 and x.max() <= 1 + 1e-4
