"""Rows that are held out: how they are divided, what their loss is, when it stops a training."""
import numpy
import pytest
import torch
from torch.testing import assert_close

from nsgf_nb import NSGF
from nsgf_nb.conditions import Condition
from nsgf_nb.data import PairSampler
from nsgf_nb.flow_matching import FlowMatching
from nsgf_nb.held_out import HeldOut, divide_condition, divide_rows
from nsgf_nb.mlp import MLP
from nsgf_nb.runs.checkpoints import LongRun
from nsgf_nb.training import Trainer

TINY = dict(batch_size=64, width=32, depth=2, device="cpu")


def noise(n=1000, D=20, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, share, count", ((100, .1, 10), (25, .1, 2), (19, .1, 0), (50, 0, 0)))
def test_every_row_is_on_one_side(n, share, count):
    kept, held_out = divide_rows(n, share, 3)
    assert len(held_out) == count and sorted([*kept.tolist(), *held_out.tolist()]) == list(range(n))
    assert torch.equal(held_out, divide_rows(n, share, 3)[1])
    assert count == 0 or not torch.equal(held_out, divide_rows(n, share, 4)[1])


def test_each_class_gives_its_share_with_its_numbers():
    x = torch.arange(60.)[:, None].expand(60, 2)
    words = ["many"]*50 + ["few"]*10
    condition = Condition.of(x, dict(word=words, number=x[:, 0].numpy()))
    kept, held_out = divide_condition(condition, .1, 0)
    assert [len(part.rows) for part in kept.parts] == [10, 45]
    assert [(len(part.rows), part.label) for part in held_out.parts] == [(5, 1)]
    for part in (*kept.parts, *held_out.parts):
        assert_close(part.numbers*x[:, 0].std(correction=0) + x[:, 0].mean(), part.rows[:, :1])


def test_the_loss_is_a_geometric_mean_over_coordinates():
    x, t = torch.zeros(50, 2), torch.zeros(50)
    target = torch.tensor([.1, 10.]).expand(50, 2)
    watched = HeldOut([(x, t, target), (x, t, -target)], 1)
    errors = torch.tensor([.01, 100.])
    expected = (errors + .01*errors.mean()).prod()**.5
    assert watched.loss(lambda x, t: torch.zeros_like(x)) == pytest.approx(expected.item())


class Scripted(HeldOut):
    "Losses that are given."
    script = [3., 2., 1., 1.5, 1.2, 1.1, 1.3, .5]

    def loss(self, net, bf16=False):
        return self.script[len(self.losses)]


def trainer_with(watched, steps=80):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def batches():
        while True:
            x = torch.randn(8, 2, generator=generator)
            yield x, torch.zeros(8), x
    return Trainer(MLP((2,), 8, 1), batches(), steps, held_out=watched)


def test_it_stops_after_some_looks_and_keeps_the_best_weights():
    watched = Scripted([], interval=10, patience=3)
    trainer = trainer_with(watched)
    best = None
    for _ in trainer:
        if trainer.step == 30:
            best = {name: w.clone() for name, w in trainer.average.module.state_dict().items()}
    assert trainer.step == 60 and trainer.done and watched.best_step == 30
    assert watched.steps == [10, 20, 30, 40, 50, 60]
    for name, w in trainer.trained_net().state_dict().items():
        assert torch.equal(w, best[name])
    patient = trainer_with(Scripted([], interval=10, patience=5))
    assert len(list(patient)) == 80 and patient.held_out.best_step == 80


def test_it_is_looked_at_after_the_last_step():
    trainer = trainer_with(Scripted([], interval=10), steps=15)
    assert len(list(trainer)) == 15 and trainer.held_out.steps == [10, 15]


def test_a_restored_trainer_stops_at_the_same_step():
    whole = trainer_with(Scripted([], interval=10, patience=3))
    list(whole)
    first = trainer_with(Scripted([], interval=10, patience=3))
    for _ in range(35):
        next(first)
    second = trainer_with(Scripted([], interval=10, patience=3))
    second.load_state_dict({name: w.clone() for name, w in first.state_dict().items()})
    assert second.step == 35 and not second.done
    while not second.done:
        next(second)
    assert second.step == whole.step == 60 and second.held_out.losses == whole.held_out.losses
    assert second.held_out.weights.keys() == whole.held_out.weights.keys()


@pytest.mark.parametrize("make", (NSGF, FlowMatching))
def test_a_training_on_noise_stops_early(make):
    settings = TINY | dict(pool_size=2**12) if make is NSGF else TINY
    model = make(**settings).fit(noise(D=50), progress=False)
    watched = model.held_out
    steps = PairSampler(noise(D=50), None, model.config, torch.device("cpu")).steps
    assert watched.best_step < len(model.losses) < steps == 15_625
    assert len(model.losses) == watched.best_step + 10*watched.interval
    assert model.sample(5).isfinite().all()


def rows_in_training(monkeypatch, data, **settings):
    "The rows of every sampler that batches are made from, and the model."
    seen = []
    make_batches = FlowMatching.make_batches

    def spy(self, sampler, progress, **options):
        seen.append(sampler.array)
        return make_batches(self, sampler, progress, **options)
    monkeypatch.setattr(FlowMatching, "make_batches", spy)
    condition = settings.pop("condition", None)
    model = FlowMatching(**TINY | settings).fit(data, condition=condition, progress=False)
    return seen, model


def test_the_rows_that_are_held_out_are_not_trained_on(monkeypatch):
    x = torch.arange(6000.)[:, None] + torch.zeros(1, 3)
    seen, model = rows_in_training(monkeypatch, x, lr=1e-9)  # stops at once
    assert sorted(len(rows) for rows in seen) == [500, 5500]  # at most 500
    assert len(torch.cat(seen).unique(dim=0)) == 6000
    assert_close(model.standardizer.mean, x.mean(0))  # of all rows


def test_what_holds_nothing_out(monkeypatch):
    for settings in (dict(train_steps=3), dict(hold_out=0, batch_size=4096)):
        seen, model = rows_in_training(monkeypatch, noise(), **settings)
        assert [len(rows) for rows in seen] == [1000] and model.held_out is None
    seen, model = rows_in_training(monkeypatch, noise(999)[:400], batch_size=4096)
    assert [len(rows) for rows in seen] == [400] and model.held_out is None


def test_classes_hold_out_their_own(monkeypatch):
    x = noise(2000, 50)
    labels = numpy.repeat(["a", "b", "rare"], [1200, 785, 15])
    seen, model = rows_in_training(monkeypatch, x, condition=labels)
    assert sorted(len(rows) for rows in seen) == [15, 78, 120, 707, 1080]
    assert model.held_out.best_step < len(model.losses) < 20_000
    assert model.sample(3, condition="rare").shape == (3, 50)


def test_a_stopped_run_is_recognised_and_an_interrupted_one_ends_with_the_same_bits(tmp_path):
    x = noise(1000, 50)
    path = tmp_path/"run"

    class Stopped(LongRun):
        def step(self, trainer, signals):
            super().step(trainer, signals)
            return trainer.step == 400

    settings = TINY | dict(width=16, depth=1)
    whole = FlowMatching(**settings).fit(x, progress=False)
    FlowMatching(**settings).fit(x, progress=False, loop=Stopped(path))
    again = FlowMatching(**settings).fit(x, progress=False, loop=LongRun(path))
    assert torch.equal(again.sample(9), whole.sample(9))
    assert again.held_out.losses == whole.held_out.losses
    third = FlowMatching(**settings).fit(x, progress=False, loop=LongRun(path))
    assert len(third.losses) == len(whole.losses) and torch.equal(third.sample(9), whole.sample(9))
