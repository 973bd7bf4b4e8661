"""Data of any kind, in the model's unit: what is accepted, what is refused, and what is drawn."""
import math

import numpy
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from nsgf_nb.data import (
    Batches,
    PairSampler,
    ShuffledRows,
    Standardizer,
    as_frame,
    as_points,
    as_sampler,
    stack_dataset,
)
from nsgf_nb.training import TrainConfig, training_steps

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
    "complex": (torch.zeros(5, 2, dtype=torch.complex64), TypeError, r"real.*complex64"),
    "sparse": (torch.eye(5).to_sparse(), TypeError, r"dense.*{}\.to_dense\(\)"),
    "masked": (numpy.ma.masked_less(numpy.eye(5), 1), TypeError, r"masked.*{}\.filled"),
    "nan": (torch.tensor([[0., 0.], [0., math.nan], [math.inf, 0.]]), ValueError, r"2 .*\(1, 1\)"),
    "ragged list": ([[0., 0.], [1.]], ValueError, "rows of one shape"),
    "words": ([["a", "b"]], TypeError, "numbers.*list"),
    "text": ("data", TypeError, "str"),
    "nothing": (None, TypeError, "NoneType"),
    "times": (numpy.zeros((5, 2), "M8[s]"), TypeError, "datetime64"),
    "function of words": (lambda n: [["a"]]*n, TypeError, "numbers"),
    "function of nan": (lambda n: torch.full((n, 2), math.nan), ValueError, r"\(0, 0\)"),
    "function of too few": (lambda n: torch.zeros(3, 2), ValueError, r"\d+ samples.*\(3, 2\)"),
    "function of numbers": (lambda n: torch.zeros(n), ValueError, r"\(n, 1\)"),
    "dataset of one": (TensorDataset(torch.zeros(1, 2)), ValueError, "got 1"),
    "empty dataset": (TensorDataset(torch.zeros(0, 2)), ValueError, "0, 2"),
    "empty loader": (DataLoader(TensorDataset(torch.zeros(0, 2))), ValueError, "one batch"),
    "loader of dicts": (DataLoader(Named()), TypeError, "dict with keys image"),
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
    expected = pairs(x).target(10)
    assert expected.shape == (10, 1, 4, 4)

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
    forms = (TensorDataset(x), TensorDataset(x, labels), Images(), Alone(), Lists(),
             Subset(Images(), range(64)), x.numpy(), x.tolist(), x.mT.contiguous().mT)
    for data in forms:
        assert_close(pairs(data).target(10), expected)


def same_values(points, expected):
    return torch.equal(points.double(), torch.tensor(expected, dtype=torch.float64))


def test_whatever_numpy_takes():
    rows = [[1., 2.], [3., 4.], [5., 7.]]
    array = numpy.array(rows)
    frozen = array.copy()
    frozen.flags.writeable = False
    forms = (array, frozen, array.astype(">f4"), array.astype("f2"), array.astype("g"),
             array.astype("u8"), array.astype(bool) * array, rows, [tuple(row) for row in rows],
             torch.tensor(rows).long(), torch.tensor(rows).byte(), torch.tensor(rows).half())
    for form in forms:
        assert same_values(as_points(form), rows)
    assert same_values(as_points(array[::-1]), rows[::-1])
    assert same_values(as_points(array[:, 1:]), [[2.], [4.], [7.]])
    assert as_points(torch.tensor([[2**40 + 1, 0]])).tolist() == [[2.**40 + 1, 0.]]
    assert same_values(as_points(array > 3), [[0, 0], [0, 1], [1, 1]])


def test_the_users_array_is_not_changed_by_what_comes_out():
    array = numpy.ones((3, 2))
    as_points(array).zero_()
    assert (array == 1).all()


def test_dlpack():
    class Foreign:
        def __init__(self, x):
            self.__dlpack__ = x.__dlpack__
            self.__dlpack_device__ = x.__dlpack_device__
    assert same_values(as_points(Foreign(torch.tensor([[1., 2.]]))), [[1., 2.]])


@pytest.fixture
def pandas():
    return pytest.importorskip("pandas")


def test_a_data_frame_goes_in_and_comes_out(pandas):
    frame = pandas.DataFrame({"age": [1, 2, 4], "ok": [True, False, True], "x": [.5, 1., 2.]})
    frame["count"] = pandas.array([1, 2, 3], dtype="Int64")
    x = as_points(frame)
    assert same_values(x, [[1, 1, .5, 1], [2, 0, 1, 2], [4, 1, 2, 3]])
    assert as_frame(x, ["a", "b", "c", "d"])["c"].tolist() == [.5, 1, 2]
    with pytest.raises(ValueError, match=r"^a DataFrame.*\(3, 1, 2\)"):
        as_frame(torch.zeros(3, 1, 2))


def test_columns_that_hold_no_numbers_are_named(pandas):
    frame = pandas.DataFrame({"age": [1, None, 4], "species": ["a", "b", "c"]})
    with pytest.raises(TypeError, match=r"^data.*'species' \(.*get_dummies"):
        as_points(frame)
    with pytest.raises(ValueError, match=r"^data.*missing.*'age' \(1\)"):
        as_points(frame[["age"]])


def test_random_transforms_are_fresh_at_every_draw():
    class Noisy(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return i + torch.rand(3)/2
    draw = as_sampler(Noisy(), torch.Generator().manual_seed(0))
    epochs = draw(400)
    assert len(epochs.unique(dim=0)) == 400
    assert epochs.floor().unique().tolist() == [0, 1, 2, 3]
    cached = as_sampler(stack_dataset(Noisy()), torch.Generator())
    assert len(cached(400).unique(dim=0)) == 4


def test_a_data_loader_and_an_iterable_dataset_are_dealt_in_their_order():
    x = torch.arange(10.)[:, None]
    loader = DataLoader(TensorDataset(x, x), batch_size=4)
    for data in (loader, DataLoader(x, batch_size=3)):
        draw = as_sampler(data, torch.Generator())
        assert torch.equal(draw(7), x[:7])
        assert torch.equal(draw(13), torch.cat([x[7:], x]))
    draw = as_sampler(Stream(), torch.Generator())
    assert torch.equal(draw(25), torch.cat([normal(10, 2)]*3)[:25])


def test_a_shuffling_loader_depends_on_the_seed():
    loader = DataLoader(TensorDataset(normal(50, 2)), batch_size=8, shuffle=True)

    def first(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return as_sampler(loader, torch.Generator())(20)
    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


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


@pytest.mark.parametrize("rows, batch_size, steps", (
    (10, 1024, 300), (2000, 1000, 2000), (10**6, 1024, 20_000), (None, 64, 20_000)))
def test_a_training_is_a_thousand_epochs(rows, batch_size, steps):
    assert training_steps(TrainConfig(batch_size=batch_size), rows) == steps
    assert training_steps(TrainConfig(train_steps=7), rows) == 7
    assert training_steps(TrainConfig(batch_size=256), 700, 500) == 574  # of 210 epochs
    assert training_steps(TrainConfig(batch_size=256, channels=8), 700, 500) == 2734


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


def ratio(x, scale):
    z = pairs(x, scale=scale).target(1000)
    return (z.flatten(1).std(0)[0]/z.flatten(1).std(0)[1]).item()


def test_a_scale_for_each_column_of_a_table_and_one_for_anything_else():
    x = normal(1000, 2)*torch.tensor([10., 1.])
    assert ratio(x, "auto") == pytest.approx(1, rel=.01)
    assert ratio(x, "feature") == pytest.approx(1, rel=.01)
    assert ratio(x, "global") == pytest.approx(10, rel=.1)
    assert ratio(x.view(-1, 1, 2), "auto") == pytest.approx(10, rel=.1)
    assert torch.equal(pairs(x, scale="none").target(1000).sort(0).values, x.sort(0).values)
    with pytest.raises(ValueError, match=r"scale='feature'.*\(1000, 1, 2\)"):
        pairs(x.view(-1, 1, 2), scale="feature")
    with pytest.raises(ValueError, match="scale.*auto.*column"):
        pairs(x, scale="column")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_constant_columns_are_left_out_and_returned_exactly(dtype):
    x = normal(100, 4).to(dtype)
    x[:, 1] = .1
    x[:, 3] = 1e7 + .3
    standardizer = pairs(x).standardizer
    z = standardizer.to_model(x)
    assert z.shape == (100, 2) and standardizer.model_shape == (2,)
    back = standardizer.to_data(torch.randn(3, 5, 2))  # a trajectory
    assert back.shape == (3, 5, 4)
    assert (back[..., 1] == x[0, 1]).all() and (back[..., 3] == x[0, 3]).all()
    assert_close(standardizer.to_data(z), x)
    assert (standardizer.velocity_to_data(z)[:, [1, 3]] == 0).all()


def test_the_volume_of_a_scale():
    x = normal(1000, 3)*torch.tensor([10., 1., 0.])
    feature = Standardizer.of(x, CPU, "feature")
    assert feature.log_volume() == pytest.approx(feature.scale[:2].log().sum().item())
    one = Standardizer.of(x[:, :2], CPU)
    assert one.log_volume() == pytest.approx(2*one.scale.log().item())


def test_too_small_a_variation_of_one_column_names_the_column():
    x = normal(100, 3)
    x[:, 2] += 1e7
    with pytest.raises(ValueError, match="^data varies in column 2 .*float32.*float64"):
        pairs(x)
    pairs(x.double())


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
    sampler = pairs(images, flip=True)
    flipped = sampler.standardizer.to_data(sampler.target(200))
    left_is_brighter = flipped[..., :2].mean((1, 2, 3)) > flipped[..., 2:].mean((1, 2, 3))
    assert 60 < left_is_brighter.sum() < 140
    with pytest.raises(ValueError, match=r"flip.*\(2,\)"):
        pairs(normal(50, 2), flip=True)
