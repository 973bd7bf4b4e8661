"""Data of any kind, in the model's unit: what is accepted, what is refused, and what is drawn."""
import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from nsgf_nb.data import Batches, PairSampler, ShuffledRows, Standardizer, as_sampler
from nsgf_nb.training import TrainConfig

CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(data, source=None, **settings):
    return PairSampler(data, source, TrainConfig(**settings), CPU)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(normal(10, 2))


class Unequal(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return torch.zeros(i + 1)


class Named(Unequal):
    def __getitem__(self, i):
        return {"image": torch.zeros(2)}


BAD = {
    "empty": (torch.zeros(0, 2), ValueError, r"\(0, 2\)"),
    "one point": (torch.zeros(1, 2), ValueError, "2 samples, got 1"),
    "numbers": (torch.zeros(5), ValueError, r"\(n, \*shape\).*\(5,\).*\(n, 1\)"),
    "no features": (torch.zeros(5, 0), ValueError, r"\(5, 0\)"),
    "ints": (torch.zeros(5, 2, dtype=torch.int32), TypeError, r"int32.*{}\.float\(\)"),
    "bools": (torch.zeros(5, 2, dtype=torch.bool), TypeError, r"bool.*{}\.float\(\)"),
    "nan": (torch.tensor([[0., 0.], [0., math.nan], [math.inf, 0.]]), ValueError, r"2 .*\(1, 1\)"),
    "numpy": (torch.zeros(5, 2).numpy(), TypeError, "ndarray"),
    "list": ([[0., 0.], [1., 1.]], TypeError, "list"),
    "text": ("data", TypeError, "str"),
    "function of numpy": (lambda n: torch.zeros(n, 2).numpy(), TypeError, "ndarray"),
    "function of ints": (lambda n: torch.zeros(n, 2).long(), TypeError, "int64"),
    "function of nan": (lambda n: torch.full((n, 2), math.nan), ValueError, r"\(0, 0\)"),
    "function of too few": (lambda n: torch.zeros(3, 2), ValueError, r"\d+ samples.*\(3, 2\)"),
    "function of numbers": (lambda n: torch.zeros(n), ValueError, r"\(n, 1\)"),
    "dataset of one": (TensorDataset(torch.zeros(1, 2)), ValueError, "got 1"),
    "empty dataset": (TensorDataset(torch.zeros(0, 2)), ValueError, "2 samples"),
    "dataset of ints": (TensorDataset(torch.zeros(5, 2).byte()), TypeError, r"{}\.float\(\)"),
    "iterable dataset": (Stream(), TypeError, "map-style.*Stream"),
    "samples of unequal shape": (Unequal(), ValueError, "one shape"),
    "samples in dicts": (Named(), ValueError, "Dataset"),
}


@pytest.mark.parametrize("bad, error, words", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ("data", "source"))
def test_bad_input_raises_an_error_that_names_the_argument(name, bad, error, words):
    with pytest.raises(error, match=f"^{name}.*" + words.format(name)):
        draw = as_sampler(bad, torch.Generator(), name)
        draw(2**14)


SOURCES = {"tensor": normal(50, 3), "function": lambda n: normal(n, 3), "shape": normal(50, 1, 2),
           "Dataset": TensorDataset(normal(50, 3))}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_source_of_another_shape_is_refused(source):
    with pytest.raises(ValueError, match=r"^source.*\(n, 2\).*(3|1, 2)\)"):
        pairs(normal(100, 2), source).source(5)


def test_the_same_sample_in_every_form():
    x = normal(64, 1, 4, 4)
    labels = torch.arange(64)

    class Images(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, i):
            return x[i], int(labels[i])

    class Alone(Images):
        def __getitem__(self, i):
            return x[i].numpy()

    class Lists(Images):
        def __getitem__(self, i):
            return [x[i], "label"]
    expected = pairs(x).target(10)
    assert expected.shape == (10, 1, 4, 4)
    forms = (TensorDataset(x), TensorDataset(x, labels), Images(), Alone(), Lists(),
             Subset(Images(), range(64)))
    for data in forms:
        assert torch.equal(pairs(data).target(10), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64), ids=str)
def test_floats_of_any_precision(dtype):
    data = normal(100, 2).to(dtype)
    assert_close(pairs(data).target(50), pairs(data.float()).target(50), atol=1e-3, rtol=1e-3)


def test_an_epoch_deals_every_row_once():
    draw = as_sampler(torch.arange(10.)[:, None], torch.Generator().manual_seed(0))
    epochs = draw(30).view(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_draws_carry_no_graph():
    sampler = pairs(normal(100, 2).requires_grad_(), normal(100, 2, seed=1).requires_grad_())
    assert not sampler.target(5).requires_grad
    assert not sampler.source(5).requires_grad


# ---- standardising

@pytest.mark.parametrize("shape", ((2,), (3, 4, 5)))
def test_mean_zero_root_mean_square_one_and_back(shape):
    x = 40*normal(500, *shape) + 7
    standardizer = Standardizer.of(x, CPU)
    z = standardizer.to_model(x)
    assert z.mean(0).abs().max() < 1e-5
    assert z.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert_close(standardizer.to_data(z), x)
    assert 35 < standardizer.scale < 45


def test_one_scale_for_all_features():
    x = normal(1000, 2)*torch.tensor([10., 1.])
    z = Standardizer.of(x, CPU).to_model(x)
    assert (z.std(0)[0]/z.std(0)[1]).item() == pytest.approx(10, rel=.1)


def test_a_repeated_point_has_scale_one():
    assert Standardizer.of(torch.full((10, 2), 5.), CPU).scale == 1


def test_too_small_a_variation_for_float32_is_refused():
    x = normal(100, 1) + 1e7
    with pytest.raises(ValueError, match="^data varies .*float32.*float64"):
        Standardizer.of(x, CPU)
    Standardizer.of(normal(100, 1).double() + 1e7, CPU)


# ---- random streams

def test_restarting_depends_on_the_key_alone():
    class Stream:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(0)
            self.get_state = self.generator.get_state
            self.set_state = self.generator.set_state

        def __call__(self, n):
            return torch.randn(n, 2, generator=self.generator)
    sampler = pairs(normal(50, 2), Stream())

    def draws(*key):
        sampler.restart(*key)
        return torch.cat([sampler.source(3), sampler.target(3), torch.rand(3, 2)])
    with torch.random.fork_rng():
        first = draws("shard", 1)
        sampler.target(7)
        other = draws("shard", 2)
        assert torch.equal(draws("shard", 1), first)
        assert not torch.equal(first, other)


def test_batches_restore_their_streams():
    generator = torch.Generator().manual_seed(0)
    deck = ShuffledRows(torch.arange(10.)[:, None], generator)
    batches = Batches(lambda: (deck(4), torch.rand(2, generator=generator)), [generator, deck])
    next(batches)
    state = {name: tensor.clone() for name, tensor in batches.state_dict().items()}
    expected = next(batches)
    next(batches)
    batches.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(next(batches), expected))


def test_flip_mirrors_half_of_the_images():
    images = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[..., :2] = 0
    plain = pairs(images).target(200)
    flipped = pairs(images, flip=True).target(200)
    left_is_brighter = flipped[..., :2].mean((1, 2, 3)) > flipped[..., 2:].mean((1, 2, 3))
    assert 60 < left_is_brighter.sum() < 140
    assert not torch.equal(plain, flipped)
    with pytest.raises(ValueError, match=r"flip.*\(2,\)"):
        pairs(normal(50, 2), flip=True)
