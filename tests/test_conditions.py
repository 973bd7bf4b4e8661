"""Flows within each class: what the classes may be, what is learned, what is refused."""
import json
import math

import numpy
import pandas
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from nsgf_nb import NSGF, NSGFPlusPlus
from nsgf_nb.conditions import Classes, Condition, Conditions, class_sizes
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


# ---- what a condition may be

@pytest.mark.parametrize("condition, values", (
    ([3, 1, 3, 1], [1, 3]), (torch.tensor([3, 1, 3, 1]), [1, 3]), (["b", "a"]*2, ["a", "b"]),
    ([True, False]*2, [False, True]),
    (numpy.array(["y", "x", "y", "x"], dtype=object), ["x", "y"])))
def test_integers_truth_values_and_words_are_classes(condition, values):
    kinds, indices, numbers = Conditions.of(condition, 4)
    assert kinds.classes.values == values and kinds.classes.shares == [.5, .5]
    assert indices.tolist() == [1, 0, 1, 0] and numbers is None
    assert kinds.read(values[1], 3)[0].tolist() == [1, 1, 1]
    assert kinds.read(condition, 4)[0].tolist() == [1, 0, 1, 0]
    assert kinds.inputs == dict(classes=3, numbers=0)


@pytest.mark.parametrize("condition, k", (
    ([.5, 1., 2., 3.5], 1), (numpy.array([2., 0., 2., 0.]), 1), (torch.rand(4, 3), 3),
    (numpy.ones((4, 2), "float32"), 2)))
def test_floats_are_numbers(condition, k):
    kinds, indices, numbers = Conditions.of(condition, 4)
    assert kinds.inputs == dict(classes=0, numbers=k) and indices is None
    assert numbers.shape == (4, k) and numbers.mean(0).abs().max() < 1e-6
    assert_close(kinds.read(condition, 4)[1], numbers)
    for one in [[1.5], 1.5] if k == 1 else [[1.5]*k]:
        same = kinds.read(one, 4)[1]
        assert same.shape == (4, k) and (same == same[0]).all()


def test_several_columns_have_names():
    table = pandas.DataFrame(dict(town=["a", "b", "a", "b"], old=[True, True, False, True],
                                  size=[1., 2., 3., 4.]))
    table.loc[len(table)] = ["a", True, 0.]
    table.loc[len(table)] = ["a", False, 9.]
    kinds, indices, numbers = Conditions.of(table, 6)
    assert kinds.classes.values == [("a", False), ("a", True), ("b", True)]
    assert indices.tolist() == [1, 2, 0, 2, 1, 0] and numbers.shape == (6, 1)
    indices, numbers = kinds.read(dict(size=[3, 4], old=True, town="b"), 2)
    assert indices.tolist() == [2, 2] and numbers[1] > numbers[0]
    with pytest.raises(ValueError, match=r"condition must be among .*got \('b', False\)"):
        kinds.read(dict(town="b", old=False, size=1.), 2)
    with pytest.raises(ValueError, match="condition must be a dict of town, old, size, got a dict "
                                         "of town"):
        kinds.read(dict(town="b"), 2)
    with pytest.raises(ValueError, match="a dict of town, old, size, got str"):
        kinds.read("b", 2)
    again = Conditions.from_description(json.loads(json.dumps(kinds.describe())))
    assert again.describe() == kinds.describe() and again.classes.values == kinds.classes.values
    whole = kinds.spread(dict(town="b", old=True, size=[1, 2]), 2)
    assert whole["town"].tolist() == ["b", "b"] and whole["size"].tolist() == [[1], [2]]
    assert kinds.value_of("old", "True") is True and kinds.value_of("size", "2.5") == 2.5
    with pytest.raises(ValueError, match="town must be one of a, b, got 'c'"):
        kinds.value_of("town", "c")
    with pytest.raises(ValueError, match="size must be a number, got 'c'"):
        kinds.value_of("size", "c")
    drawn = Conditions.of(table[["town", "old"]], 6)[0].some(5)
    assert set(drawn) == {"town", "old"} and len(drawn["old"]) == 5


@pytest.mark.parametrize("condition, error, words", (
    ([[1, 2]]*4, ValueError, r"condition must be one class or a vector of 4.*\(4, 2\)"),
    ([1, 2, 1], ValueError, r"condition must have 4.*got shape \(3,\)"),
    (3, ValueError, r"condition must have 4.*got shape \(\)"),
    (dict(a=[1, 1, 2, 2], b=[1., 2.]), ValueError, r"b must have 4.*got shape \(2,\)"),
    ([1, 1, 1, 2], ValueError, "condition.*at least 2 rows.*1 of 2"),
    ([1., 2., math.nan, 0.], ValueError, "condition must be finite"),
    (numpy.zeros(4, "M8[s]"), TypeError, "condition.*datetime64"),
))
def test_what_is_no_condition(condition, error, words):
    with pytest.raises(error, match=words):
        Conditions.of(condition, 4)


def test_conditions_of_another_kind():
    classes, _, _ = Conditions.of([1, 2, 3]*2, 6)
    with pytest.raises(ValueError, match="condition must be among 1, 2, 3, got 7"):
        classes.read(7, 2)
    with pytest.raises(ValueError, match=r"one class or a vector of 3, got shape \(2,\)"):
        classes.read([1, 2], 3)
    with pytest.raises(ValueError, match=r"among 0, 1.*… \(40 in all\), got 'x'"):
        Classes(range(40), [1/40]*40).indices(["x"])
    numbers, _, _ = Conditions.of(torch.rand(6, 2), 6)
    with pytest.raises(ValueError, match=r"of shape \(3, 2\), or \(2,\) for all.*got \(3,\)"):
        numbers.read([1., 2., 3.], 3)
    with pytest.raises(TypeError, match="condition must hold numbers, got words"):
        numbers.read(["a", "b"], 2)
    with pytest.raises(ValueError, match="condition must be given: .*numbers"):
        numbers.some(3)


def test_drawn_classes_are_as_frequent_as_in_the_data():
    drawn = Classes(["a", "b"], [.2, .8]).some(10_000, seed=1)
    assert drawn.count("b")/10_000 == pytest.approx(.8, abs=.02)
    assert drawn == Classes(["a", "b"], [.2, .8]).some(10_000, seed=1)


@pytest.mark.parametrize("shares, size, sizes", (
    ([.995, .005], 100, [99, 1]), ([.1]*10, 64, None), ([.5, .3, .2], 10, [5, 3, 2]),
    ([.98, .01, .01], 3, [1, 1, 1])))
def test_a_batch_is_divided_among_classes(shares, size, sizes):
    assert sum(class_sizes(shares, size)) == size
    assert max(abs(n - share*size) for n, share in zip(class_sizes(shares, size), shares)) < 2
    assert sizes in (None, class_sizes(shares, size))
    with pytest.raises(ValueError, match="batch_size must be at least 3, the number of classes"):
        class_sizes([.3, .3, .4], 2)


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
    with pytest.raises(ValueError, match="conditions"):
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
    with pytest.raises(ValueError, match="condition must be None.*without one"):
        model.sample(3, condition="top")
    for data in (TensorDataset(x), lambda n: torch.randn(n, 2)):
        with pytest.raises(TypeError, match="data must be an array.*condition"):
            FlowMatching(**TINY).fit(data, condition=words, progress=False)
    with pytest.raises(ValueError, match="condition must be None for coupling='reflow'"):
        FlowMatching(**TINY, coupling="reflow").fit(x, condition=words, teacher=model)
    with pytest.raises(ValueError, match="plan must be None where condition is given"):
        NSGF(**TINY, coupling="population").fit(x, condition=words, progress=False, plan=3)
    refitted = FlowMatching(**TINY).fit(x, condition=words, progress=False)
    assert refitted.fit(x, progress=False).classes is None and refitted.sample(2).shape == (2, 2)
    assert math.isfinite(model.sample(2).sum())


# ---- numbers

def on_a_line(n=4000):
    "x = c + noise of deviation .3, beside a column that does not depend on c."
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(n, generator=generator)*4 - 2
    x = torch.randn(n, 2, generator=generator)*torch.tensor([.3, 1.])
    return x + torch.stack([c, 0*c], 1), c


@pytest.fixture(scope="module", params=KINDS)
def numbers_model(request):
    x, c = on_a_line()
    make, settings = KINDS[request.param]
    more = dict(pool_size=2**13, minibatch=256) if settings else {}
    model = make(**SMALL | dict(train_steps=600) | settings | more)
    return model.fit(x, condition=c, progress=False)


def test_samples_follow_the_numbers(numbers_model):
    for c in (-1.5, 0., 1.2):
        x = numbers_model.sample(1000, condition=c)
        assert_close(x.mean(0), torch.tensor([c, 0.]), atol=.15, rtol=0)
        assert .2 < x[:, 0].std() < .45 and .8 < x[:, 1].std() < 1.2
    c = torch.linspace(-1.5, 1.5, 500)
    x, nfe = numbers_model.sample(500, condition=c, return_nfe=True)
    assert numpy.corrcoef(x[:, 0], c)[0, 1] > .9 and (nfe == 10).all()


def test_numbers_in_files_codes_and_densities(numbers_model, tmp_path):
    numbers_model.save(tmp_path/"m.safetensors")
    again = type(numbers_model).load(tmp_path/"m.safetensors", "cpu")
    assert torch.equal(again.sample(20, condition=.5), numbers_model.sample(20, condition=.5))
    x, c = on_a_line(50)
    inside = again.log_prob(x, condition=c)
    true = -((x[:, 0] - c)/.3).square()/2 - math.log(.3) - x[:, 1].square()/2 - math.log(2*math.pi)
    assert (inside - true).abs().mean() < .6
    elsewhere = again.log_prob(x, condition=c - 2*c.sign())
    assert (inside - elsewhere).median() > 5
    z = again.encode(x, condition=c)
    assert_close(again.decode(z, condition=c), x, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="condition must be given: .*numbers"):
        again.sample(3)
    with pytest.raises(ValueError, match="equal numbers of steps"):
        again.sample(4, condition=0., t_start=torch.tensor([0., .3, .6, .9]), step_size=.1)


def test_a_constant_number_says_nothing():
    x, c = on_a_line(100)
    both = torch.stack([c, torch.full_like(c, 3.)], 1)
    model = FlowMatching(**TINY).fit(x, condition=both, progress=False)
    assert model.conditions.inputs == dict(classes=0, numbers=1)
    assert model.sample(4, condition=[.5, 3.]).shape == (4, 2)
    constant = FlowMatching(**TINY).fit(x, condition=both[:, 1], progress=False)
    assert constant.sample(4, condition=3.).shape == (4, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_of_numbers_learns_from(kind):
    "Numbers do not move; each particle keeps its own, and ends at data with nearly equal ones."
    x, c = on_a_line(500)
    make, settings = KINDS[kind]
    model = make(**TINY | dict(batch_size=4000) | settings | dict(minibatch=256))
    condition = Condition.of(x, c)
    trainer = model.make_trainer(model_sampler(model, x), False, condition=condition)
    states, t, velocity, given = next(trainer.batches)
    assert states.shape == velocity.shape == (4000, 2) and given.shape == (4000, 2)
    assert (given[:, 1] == 1).all() and given[:, 0].std().item() == pytest.approx(1, abs=.1)
    ends = model_sampler(model, x).standardizer.to_data(states + (1 - t)[:, None]*velocity)
    own = given[:, 0]*condition.kinds.numbers.scale + condition.kinds.numbers.mean
    assert (ends[:, 0] - own).abs().mean() < .55


def model_sampler(model, x):
    from nsgf_nb.data import PairSampler
    return PairSampler(x, None, model.config, model.device)


def test_guidance_and_several_conditions_at_once():
    x, c = on_a_line()
    side = numpy.where(numpy.arange(len(x)) % 2, "up", "down")
    x = x + torch.from_numpy(numpy.where(side == "up", 3., -3.))[:, None]*torch.tensor([0., 1.])
    model = FlowMatching(**SMALL | dict(train_steps=600), drop_condition=.2)
    model.fit(x.numpy(), condition=pandas.DataFrame(dict(side=side, c=c.numpy())), progress=False)
    asked = dict(side="up", c=1.)
    y = model.sample(500, condition=asked)
    assert_close(y.mean(0), torch.tensor([1., 3.], dtype=y.dtype), atol=.3, rtol=0)
    guided, nfe = model.sample(500, condition=asked, guidance=2., return_nfe=True)
    assert guided[:, 1].mean() > y[:, 1].mean() and (nfe == 20).all()
    assert model(x[:3], .5, dict(side=["up", "down", "up"], c=0.)).shape == (3, 2)


def test_images_with_numbers_and_a_source_of_their_own():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 8, 8, generator=generator)*2 - 1
    brightness = images.mean((1, 2, 3))
    settings = dict(train_steps=3, batch_size=8, channels=4, mult=(1, 2), device="cpu")
    for coupling in ("independent", "ot", "population"):
        model = FlowMatching(**settings, coupling=coupling, pool_size=64)
        model.fit(images, source=images.flip(0), condition=brightness, progress=False)
        assert model.sample(5, condition=.1).shape == (5, 1, 8, 8)
    with pytest.raises(ValueError, match="flip must be False"):
        FlowMatching(**settings, flip=True).fit(images, condition=brightness, progress=False)


# ---- NSGF++

@pytest.mark.parametrize("handover", ("paper", "flow"))
@pytest.mark.parametrize("kind", ("classes", "numbers"))
def test_nsgfpp_takes_conditions(handover, kind, tmp_path):
    generator = torch.Generator().manual_seed(0)
    light = torch.arange(200) % 2 == 0
    images = torch.rand(200, 1, 8, 8, generator=generator)*.4 - .7
    images[light] += 1.
    condition = light if kind == "classes" else images.mean((1, 2, 3))
    settings = dict(train_steps=150, batch_size=32, channels=8, mult=(1, 2), pool_size=2**10,
                    minibatch=64, device="cpu", ema=.9)
    model = NSGFPlusPlus(**settings, handover=handover, delivered=256)
    model.fit(images, condition=condition, progress=False)
    asked = (True, False) if kind == "classes" else (.5, -.5)
    means = [model.sample(32, condition=value).mean() for value in asked]
    assert means[0] > .25 and means[1] < -.25
    model.save(tmp_path/"m.safetensors")
    again = NSGFPlusPlus.load(tmp_path/"m.safetensors", "cpu")
    assert torch.equal(again.sample(8, condition=asked[0]), model.sample(8, condition=asked[0]))
    if kind == "classes":
        assert model.classes.values == [False, True] and model.sample(6).shape == (6, 1, 8, 8)
