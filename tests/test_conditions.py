"""Flows within each class: what the classes may be, what is learned, what is refused."""
import math

import numpy
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from nsgf_nb import NSGF, NSGFPlusPlus
from nsgf_nb.conditions import Classes, class_sizes
from nsgf_nb.flow_matching import FlowMatching
from nsgf_nb.runs.checkpoints import LongRun

SMALL = dict(train_steps=300, batch_size=256, width=48, depth=2, device="cpu", ema=.99)
TINY = dict(train_steps=4, batch_size=32, width=8, depth=1, device="cpu")
KINDS = {"FM": (FlowMatching, {}), "OT-CFM": (FlowMatching, dict(coupling="ot", pool_size=2**12)),
         "NSGF": (NSGF, dict(pool_size=2**12, minibatch=64)),
         "population": (NSGF, dict(coupling="population", pool_size=2**12))}


def three_clusters(n=900):
    "Rows in three places, and their words."
    generator = torch.Generator().manual_seed(0)
    k = torch.arange(n) % 3
    x = torch.randn(n, 2, generator=generator)*.3 + torch.tensor([[0., 4.], [-3., 0.], [3., 0.]])[k]
    return x, numpy.array(["top", "left", "right"])[k]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    x, words = three_clusters()
    make, settings = KINDS[request.param]
    return make(**SMALL, **settings).fit(x, condition=words, progress=False)


# ---- classes

@pytest.mark.parametrize("condition, values", (
    ([3, 1, 3, 1], [1, 3]), (torch.tensor([3, 1, 3, 1]), [1, 3]), (["b", "a"]*2, ["a", "b"]),
    (numpy.array([2., 0., 2., 0.]), [0, 2]), ([True, False]*2, [False, True]),
    (numpy.array(["y", "x", "y", "x"], dtype=object), ["x", "y"])))
def test_integers_truth_values_and_words_are_classes(condition, values):
    classes, indices = Classes.of(condition, 4)
    assert classes.values == values and classes.shares == [.5, .5]
    assert indices.tolist() == [1, 0, 1, 0]
    assert classes.indices(values[1], 3).tolist() == [1, 1, 1]
    assert classes.indices(condition).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("condition, error, words", (
    ([.5, 1., 2., 3.], TypeError, "condition.*classes.*fractions"),
    ([[1, 2], [1, 2]], ValueError, r"condition.*vector.*\(2, 2\)"),
    ([1, 2, 1], ValueError, "condition must have 4.*got 3"),
    ([1, 1, 1, 2], ValueError, "condition.*at least 2 rows.*1 of 2"),
    (numpy.zeros(4, "M8[s]"), TypeError, "condition.*datetime64"),
))
def test_what_are_no_classes(condition, error, words):
    with pytest.raises(error, match=words):
        Classes.of(condition, 4)


def test_classes_that_were_not_seen():
    classes = Classes([1, 2, 3], [.2, .3, .5])
    with pytest.raises(ValueError, match="condition must be among 1, 2, 3, got 7"):
        classes.indices(7, 2)
    with pytest.raises(ValueError, match="condition must be one class or 3 of them, got 2"):
        classes.indices([1, 2], 3)
    with pytest.raises(ValueError, match=r"among 0, 1.*… \(40 in all\), got 'x'"):
        Classes(range(40), [1/40]*40).indices("x")


def test_drawn_classes_are_as_frequent_as_in_the_data():
    drawn = Classes(["a", "b"], [.2, .8]).draw(10_000, seed=1)
    assert drawn.float().mean().item() == pytest.approx(.8, abs=.02)
    assert torch.equal(drawn, Classes(["a", "b"], [.2, .8]).draw(10_000, seed=1))
    assert class_sizes([.995, .005], 100) == [100, 1]


# ---- models

def test_each_class_has_its_own_flow(model):
    x, words = three_clusters()
    for word in ("top", "left", "right"):
        samples = model.sample(300, condition=word)
        own = x[torch.from_numpy(words == word)]
        assert_close(samples.mean(0), own.mean(0), atol=.25, rtol=0)
        assert ((samples - own.mean(0)).norm(dim=1) < 2).float().mean() > .95


def test_samples_keep_the_order_of_their_classes(model):
    words = ["left", "top", "top", "right", "left"]*20
    x, nfe = model.sample(100, condition=words, return_nfe=True)
    side = x[:, 0].view(20, 5)
    assert (side[:, 0] < -1).all() and (side[:, 4] < -1).all() and (side[:, 3] > 1).all()
    assert (x[:, 1].view(20, 5)[:, 1:3] > 2).all() and (nfe == model.config.sample_steps).all()
    states = model.sample(100, condition=words, trajectory=True)
    assert torch.equal(states[-1], x)


def test_without_a_condition_classes_come_as_often_as_in_the_data(model):
    x = model.sample(3000)
    shares = [(x[:, 1] > 2).float().mean(), (x[:, 0] < -1.5).float().mean()]
    assert_close(torch.stack(shares), torch.tensor([1/3, 1/3]), atol=.05, rtol=0)
    assert torch.equal(x, model.sample(3000))


def test_fields_codes_and_densities_depend_on_the_class(model):
    x, words = three_clusters(60)
    inside = model.log_prob(x, condition=words)
    outside = model.log_prob(x, condition=numpy.roll(words, 1))
    assert (inside - outside > 2).all()
    z = model.encode(x, condition=words)
    assert_close(model.decode(z, condition=words), x, atol=1e-3, rtol=0)
    assert z.norm(dim=1).max() < 6
    assert not torch.equal(model(x, .5, "top"), model(x, .5, "left"))
    whole = model(x, .5, words)
    assert_close(whole[:1], model(x[:1], .5, words[0].item()))
    for call in (lambda: model(x, .5), lambda: model.log_prob(x), lambda: model.encode(x)):
        with pytest.raises(ValueError, match="condition must be given"):
            call()


def test_a_file_keeps_the_classes(model, tmp_path):
    model.save(tmp_path/"m.safetensors")
    again = type(model).load(tmp_path/"m.safetensors", "cpu")
    assert again.classes.values == ["left", "right", "top"]
    assert torch.equal(again.sample(20, condition="top"), model.sample(20, condition="top"))
    assert torch.equal(again.sample(20), model.sample(20))


def test_a_stopped_training_is_resumed_to_the_same_bits(tmp_path):
    x, words = three_clusters(90)
    make = NSGF(**TINY | dict(train_steps=12, drop_condition=.3), pool_size=128, minibatch=32)
    whole = make.fit(x, condition=words, progress=False).sample(9, condition="top")

    class Stopped(LongRun):
        def step(self, trainer, signals):
            stop = super().step(trainer, signals)
            if trainer.step == 5:
                signals.append(KeyboardInterrupt)
                return True
            return stop
    with pytest.raises(KeyboardInterrupt):
        make.fit(x, condition=words, progress=False, loop=Stopped(tmp_path/"c"))
    resumed = make.fit(x, condition=words, progress=False, loop=LongRun(tmp_path/"c"))
    assert torch.equal(resumed.sample(9, condition="top"), whole)
    with pytest.raises(ValueError, match="classes"):
        make.fit(x, condition=["a", "b"]*45, progress=False, loop=LongRun(tmp_path/"c"))


def test_guidance_sharpens_a_class():
    x, words = three_clusters()
    model = FlowMatching(**SMALL, drop_condition=.2).fit(x, condition=words, progress=False)
    plain = model.sample(200, condition="top")
    guided, nfe = model.sample(200, condition="top", guidance=2., return_nfe=True)
    assert guided[:, 1].mean() > plain[:, 1].mean() and (nfe == 20).all()
    assert torch.equal(model.sample(200, condition="top", guidance=1.), plain)
    unguided = FlowMatching(**TINY).fit(x, condition=words, progress=False)
    with pytest.raises(ValueError, match="guidance must be 1, got 2.*drop_condition"):
        unguided.sample(3, guidance=2.)


def test_images_have_classes():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))*2 - 1
    images[::2, :, :4] = -1
    settings = dict(train_steps=3, batch_size=8, channels=4, mult=(1, 2), device="cpu")
    model = FlowMatching(**settings).fit(images, condition=[0, 1]*20, progress=False)
    assert model.sample(5, condition=1).shape == (5, 1, 8, 8)
    assert model.log_prob(images[:2], steps=2, condition=[0, 1]).isfinite().all()


def test_constant_columns_and_units():
    x, words = three_clusters()
    table = torch.cat([x*torch.tensor([1e3, 1e-3]), torch.full((len(x), 1), 7.)], 1)
    model = FlowMatching(**SMALL).fit(table.numpy(), condition=words, progress=False)
    samples = model.sample(300, condition="right")
    assert (samples[:, 2] == 7).all() and samples[:, 0].mean().item() == pytest.approx(3e3, rel=.1)


def test_a_model_without_classes_takes_no_condition():
    x, words = three_clusters(30)
    model = FlowMatching(**TINY).fit(x, progress=False)
    with pytest.raises(ValueError, match="condition must be None.*without classes"):
        model.sample(3, condition="top")
    for data in (TensorDataset(x), lambda n: torch.randn(n, 2)):
        with pytest.raises(TypeError, match="data must be an array.*condition"):
            FlowMatching(**TINY).fit(data, condition=words, progress=False)
    with pytest.raises(ValueError, match="condition must be None for coupling='reflow'"):
        FlowMatching(**TINY, coupling="reflow").fit(x, condition=words, teacher=model)
    with pytest.raises(ValueError, match="plan must be None where condition is given"):
        NSGF(**TINY, coupling="population").fit(x, condition=words, progress=False, plan=3)
    with pytest.raises(TypeError, match=r"NSGF\+\+ takes no condition"):
        NSGFPlusPlus(**TINY).fit(x, condition=words)
    refitted = FlowMatching(**TINY).fit(x, condition=words, progress=False)
    assert refitted.fit(x, progress=False).classes is None and refitted.sample(2).shape == (2, 2)
    assert math.isfinite(model.sample(2).sum())
