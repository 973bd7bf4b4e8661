"""Runs by the clock: they end on time, their schedule too, and more minutes can be added."""
import math
import os
import signal
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
from conftest import fails

from nsgf_nb import NSGF
from nsgf_nb.bench.experiments import Experiment, run
from nsgf_nb.bench.image_experiments import IMAGE_EXPERIMENTS, ImageExperiment, run_images
from nsgf_nb.bench.image_quality import TimedMeter
from nsgf_nb.bench.protocol import Protocol, measure_until
from nsgf_nb.data import PairPool
from nsgf_nb.files import read_json
from nsgf_nb.flow import TrajectoryPool
from nsgf_nb.flow_matching import FlowMatching, FlowMatchingConfig
from nsgf_nb.images import load_images
from nsgf_nb.mlp import MLP
from nsgf_nb.nsgf import NSGFConfig
from nsgf_nb.runs import minutes
from nsgf_nb.runs.checkpoints import Checkpoint, LongRun
from nsgf_nb.runs.disk_pool import DiskPool
from nsgf_nb.runs.minutes import Deadline, TimedRun, bound_pool, run_within
from nsgf_nb.targets import sample_2d
from nsgf_nb.training import Trainer, learning_rate, seeded


class Clock:
    "A clock that moves when somebody moves it."

    def __init__(self):
        self.now = 0.

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(minutes, "time", clock)
    return clock


class Ticking(Trainer):
    "A trainer whose steps take `seconds(step)` on a clock; it notes learning rates and plans."

    def __init__(self, clock, seconds, steps=10**6, **options):
        with seeded(0):
            net = MLP((2,), width=8, depth=1)
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
        super().__init__(net, repeat((x, torch.zeros(8), -x)), steps, **options)
        self.clock = clock
        self.seconds = seconds
        self.rates = []
        self.planned = []

    def record(self, loss):
        self.clock.now += self.seconds(self.step)
        self.rates.append(self.optimiser.param_groups[0]["lr"])
        self.planned.append(self.steps)
        return super().record(loss)


def run_for(seconds, clock, path, step_seconds=lambda step: .1, steps=10**6):
    trainer = Ticking(clock, step_seconds, steps)
    result = TimedRun(path, Deadline(seconds))(trainer, progress=False)
    return trainer, result


# ---- deadlines

def test_parts_of_a_deadline(clock):
    deadline = Deadline(100)
    clock.now = 20.
    assert deadline.left() == 80
    assert deadline.part(.25).left() == 20 and deadline.before(30).left() == 50
    assert deadline.fits(80) and not deadline.fits(80.1)
    clock.now = 101.
    assert deadline.left() == -1 and not deadline.fits(0)


@pytest.mark.parametrize("seconds, kept", ((4, 2), (12, 5), (100, 20), (300, 60), (3600, 60)))
def test_seconds_for_measuring(clock, seconds, kept):
    assert Deadline(seconds).measuring_seconds() == pytest.approx(kept)


# ---- runs

@pytest.mark.parametrize("planned", (3, 10**6))
def test_ends_on_time_whatever_was_planned(clock, tmp_path, planned):
    trainer, result = run_for(10, clock, tmp_path/"c", lambda step: .01, steps=planned)
    assert clock.now == pytest.approx(10, abs=.011)
    assert len(result.losses) == trainer.step == trainer.steps == pytest.approx(1000, abs=2)
    assert result.losses.isfinite().all() and (result.losses != 0).all()


def test_the_rate_falls_with_the_clock(clock, tmp_path):
    trainer, _ = run_for(200, clock, tmp_path/"c")
    n = trainer.step
    expected = [learning_rate(step, n, trainer.lr) for step in range(n)]
    after_warm_up = slice(210, None)
    assert torch.tensor(trainer.rates[after_warm_up]).allclose(
        torch.tensor(expected[after_warm_up]), atol=trainer.lr/100)
    assert trainer.rates[-1] < trainer.lr/1000


def test_a_machine_that_becomes_slower(clock, tmp_path):
    trainer, _ = run_for(200, clock, tmp_path/"c", lambda step: .1 if step < 1000 else .4)
    assert clock.now == pytest.approx(200, abs=.5)
    assert trainer.step == pytest.approx(1250, abs=5)
    assert trainer.rates[-1] < trainer.lr/100
    assert trainer.planned[900] == pytest.approx(2000, abs=20)


def test_no_step_that_would_end_too_late(clock, tmp_path):
    trainer, _ = run_for(11, clock, tmp_path/"c", lambda step: 4.)
    assert trainer.step == 3 and clock.now == 12  # 8 s, and half of a step was left
    trainer, _ = run_for(5, clock, tmp_path/"d", lambda step: 4.)
    assert trainer.step == 1


def test_a_deadline_that_has_passed_still_leaves_weights(clock, tmp_path):
    trainer, result = run_for(-1, clock, tmp_path/"c")
    assert trainer.step == 1 and len(result.losses) == 1


def test_more_minutes_continue_the_run(clock, tmp_path):
    first, _ = run_for(20, clock, tmp_path/"c")
    clock.now = 1000.
    second, result = run_for(20, clock, tmp_path/"c", steps=5)  # fewer than are done
    assert clock.now == pytest.approx(1020, abs=.11)
    assert second.step == len(result.losses) == pytest.approx(400, abs=3)
    assert torch.equal(second.losses[:first.step], first.losses)
    assert .3 < second.rates[20]/second.lr < .7  # half of the cosine is over
    assert second.planned[0] > first.step
    assert second.rates[-1] < second.lr/100


def test_a_share_of_the_time(clock, tmp_path):
    deadline = Deadline(100)
    for share, end in ((.25, 25), (.5, 62.5), (1., 100)):
        path = tmp_path/f"{share}"
        TimedRun(path, deadline, share)(Ticking(clock, lambda step: .1), progress=False)
        assert clock.now == pytest.approx(end, abs=.3)


def test_checkpoints_of_the_two_kinds_do_not_mix(clock, tmp_path):
    run_for(2, clock, tmp_path/"timed")
    with pytest.raises(ValueError, match="steps='by the clock', not 1000000"):
        LongRun(tmp_path/"timed")(Ticking(clock, lambda step: .1), progress=False)
    LongRun(tmp_path/"long")(Ticking(clock, lambda step: .1, 5), progress=False)
    with pytest.raises(ValueError, match="steps=5, not 'by the clock'"):
        run_for(2, clock, tmp_path/"long")


def test_a_signal_leaves_a_checkpoint_to_continue(clock, tmp_path):
    def stop_at_seven(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return .1
    trainer, result = run_for(50, clock, tmp_path/"c", stop_at_seven)
    assert result.interrupted is KeyboardInterrupt and trainer.step == 8
    again, result = run_for(5, clock, tmp_path/"c")
    assert result.interrupted is None and again.step == pytest.approx(58, abs=2)


def test_run_within(tmp_path):
    assert not isinstance(run_within(tmp_path/"c"), TimedRun)
    assert isinstance(run_within(tmp_path/"c", Deadline(1)), TimedRun)


# ---- what is made before the first step

class Pairs:
    def source(self, n):
        return torch.randn(n, 2, generator=torch.Generator().manual_seed(0))

    target = source


def test_pools_stop_after_their_seconds():
    settings = dict(train_steps=3, batch_size=32, width=8, depth=1, device="cpu")
    moons = sample_2d("moons", 500, 0)
    whole, cut = TrajectoryPool(), TrajectoryPool()
    for pool, seconds in ((whole, 0.), (cut, 1e-9)):
        NSGF(**settings, pool_size=2**14, minibatch=64, pool_seconds=seconds).fit(
            moons, progress=False, pool=pool)
    assert len(whole) == 2**14 and 0 < len(cut) < 2**14
    assert torch.equal(cut.states[:, :len(cut)], whole.states[:, :len(cut)])
    made = []
    for seconds in (0., 1e-9):
        def make(n, seconds=seconds):
            made.append(seconds)
            return torch.zeros(n, 2), torch.zeros(n, 2)
        pool = PairPool(make, 10, 4, torch.Generator(), progress=False, seconds=seconds)
        assert len(pool.x) == (12 if seconds == 0. else 4)
    assert made == [0., 0., 0., 1e-9]


@pytest.mark.parametrize("model", (
    NSGF(coupling="population", pool_size=5000, batch_size=64, device="cpu"),
    FlowMatching(coupling="ot", pool_size=5000, batch_size=64, device="cpu"),
    FlowMatching(coupling="population", pool_size=5000, batch_size=64, device="cpu")))
def test_pools_of_pairs_stop_too(model):
    model.set_params(train_steps=100, width=8, depth=1, pool_seconds=1e-9)
    x, t, u = next(model.batches(sample_2d("moons", 300, 0)))
    assert x.shape == u.shape == (64, 2)


def test_a_pool_on_disk_is_made_whole(tmp_path):
    model = NSGF(pool_size=256, minibatch=64, train_steps=2, pool_seconds=1., device="cpu")
    with pytest.raises(ValueError, match="pool_seconds must be 0 for a pool on disk.*got 1"):
        model.fit(sample_2d("moons", 300, 0), progress=False, pool=DiskPool(tmp_path/"pool"))


def test_classes_divide_the_seconds():
    model = NSGF(pool_size=2**15, pool_seconds=1e-9, train_steps=3, batch_size=64, minibatch=64,
                 width=8, depth=1, device="cpu")
    moons = sample_2d("moons", 300, 0)
    model.fit(moons, condition=moons[:, 0] > 0, progress=False)
    assert model.sample(5, condition=True).shape == (5, 2)


def test_bound_pool(clock):
    model = NSGF(device="cpu")
    bound_pool(model)
    assert model.config.pool_seconds == 0
    bound_pool(model, Deadline(100), .5)
    assert model.config.pool_seconds == pytest.approx(10)
    clock.now = 200.
    bound_pool(model, Deadline(-5))
    assert 0 < model.config.pool_seconds < .01


# ---- experiments

TINY = Protocol(w2_points=64, sw2_points=500, w2_draws=2, sw2_draws=(2,), sample_steps=(4,),
                floor_pairs=2)
FLOW = dict(train_steps=20, batch_size=64, width=16, depth=1)


class Looks(Deadline):
    "A deadline that passes after it was asked so many times."

    def __init__(self, looks):
        self.looks = looks

    def left(self):
        self.looks -= 1
        return 1000. if self.looks >= 0 else -1.


def test_distances_until_a_deadline():
    model = FlowMatching(**FLOW, device="cpu").fit(sample_2d("moons", 300, 0), progress=False)
    floors, measured = measure_until(Looks(4), "moons", model, TINY)
    for name in ("w2", "sw2"):
        values = measured["4"][name]["values"]
        assert floors[name]["pairs"] == len(set(values)) == 4
        assert measured["4"][name]["ratio"] > 1
    more = measure_until(Looks(5), "moons", model, TINY)[1]
    assert more["4"]["w2"]["values"][:4] == measured["4"]["w2"]["values"]
    assert measure_until(Looks(0), "moons", model, TINY) == ({}, {})


def test_images_are_measured_by_worth():
    net = dict(channels=4, mult=(1, 2), batch_size=8)
    experiment = ImageExperiment("digits", net, 2, samples=200, nfe=(2, 3, 10))
    model = FlowMatching(**net, train_steps=2, device="cpu")
    data, test = load_images("digits"), load_images("digits", "test")
    meter = TimedMeter(experiment, model, data, test, seconds=1000.)
    assert meter.meter.experiment.samples == 200
    model.fit(data, progress=False)
    one = meter.measure_until(Looks(3), model)  # to fit, before and after: three looks each
    assert list(one["nfe"]) == ["10"] and one["real"]["confident"] > .9
    two = meter.measure_until(Looks(12), model)["nfe"]  # all three, and the first again
    assert {nfe: len(m["frechet"]["values"]) for nfe, m in two.items()} == {"10": 2, "3": 1, "2": 1}
    assert two["10"]["frechet"]["values"][0] == one["nfe"]["10"]["frechet"]["mean"]
    assert two["10"]["frechet"]["mean"] == pytest.approx(
        sum(two["10"]["frechet"]["values"])/2) and two["10"]["frechet_test"]["se"] > 0
    assert meter.measure_until(Looks(0), model)["nfe"] == {}


def test_a_slow_machine_compares_fewer_images():
    experiment = ImageExperiment("digits", dict(channels=4, mult=(1, 2)), 2, samples=700, nfe=(10,))
    model = FlowMatching(channels=4, mult=(1, 2), device="cpu")
    meter = TimedMeter(experiment, model, load_images("digits"), seconds=1e-9)
    assert meter.meter.experiment.samples == 100


@pytest.mark.parametrize("config", (
    NSGFConfig(**FLOW, pool_size=512, minibatch=64, blur=.3),
    FlowMatchingConfig(**FLOW, coupling="reflow", pool_size=256)), ids=("nsgf", "reflow"))
def test_the_plane_by_the_clock(tmp_path, config):
    steps = []
    for seconds in (4, 3):
        deadline = Deadline(seconds)
        result = run("few", Experiment("moons", config, TINY), 0, tmp_path, device="cpu",
                     progress=False, deadline=deadline)
        assert deadline.left() > -60  # on time as far as a busy machine can be
        steps.append(result["steps"])
    assert steps[1] > steps[0] > 0
    folder = tmp_path/"few-timed"/"seed0"
    assert read_json(folder/"result.json")["steps"] == result["steps"]
    assert (folder/"snapshots.png").exists() and (folder/"training.checkpoint").exists()
    assert result["config"]["pool_seconds"] > 0


@pytest.mark.parametrize("name", ("digits-nsgfpp", "digits-nsgfpp-flow", "digits-classes",
                                  "digits-one-call", "cifar10-fm"))
@pytest.mark.filterwarnings("ignore:.*points for .* features", "ignore:the ascent stopped",
                            "ignore:the samples are less diverse", "ignore:not measured")
def test_images_by_the_clock(tmp_path, name):
    data, labels = None, None
    if name == "cifar10-fm":
        data = torch.rand(300, 3, 32, 32)*2 - 1
    steps, results = [], []
    for seconds in (6, 4):
        deadline = Deadline(seconds)
        results += [run_images(name, IMAGE_EXPERIMENTS[name], 0, tmp_path, "cpu", data, labels,
                               quick=True, progress=False, deadline=deadline)]
        assert deadline.left() > -60  # on time as far as a busy machine can be
        checkpoint = Checkpoint(tmp_path/f"{name}-timed"/"seed0"/"straight.checkpoint")
        steps.append(len(checkpoint.read()[0]["losses"]))
    assert 0 < steps[0] < steps[1]
    result = results[1]
    folder = tmp_path/f"{name}-timed"/"seed0"
    assert {"sheet.png", "result.json", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    if name == "cifar10-fm":
        assert "there is no classifier-cifar10" in result["measured"]["not_measured"]
    else:
        assert {"floor", "real", "nfe"} <= result["measured"].keys()
    for phase in result["phases"].values():
        assert math.isfinite(phase["loss"])


@pytest.fixture
def nsgf(command):
    from functools import partial
    return partial(command, ("nsgf", "\t", " "))


def test_the_command(nsgf, tmp_path, monkeypatch):
    from nsgf_nb.bench import experiments
    tiny = Experiment("moons", NSGFConfig(**FLOW, pool_size=512, minibatch=64, blur=.3), TINY)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"2d-moons": tiny})
    words = ("train", "2d-moons", "--minutes", ".1", "--seeds", "0", "1", "--out", tmp_path)
    code, out, err = nsgf(*words)
    assert code == 0 and not err, err
    results = [read_json(tmp_path/"2d-moons-timed"/f"seed{seed}"/"result.json")
               for seed in (0, 1)]
    assert all(result["steps"] > 0 for result in results)
    assert "--minutes" in results[0]["command"]


@pytest.mark.parametrize("words, message", (
    (("--parts", "straight"), "--parts cannot be combined with --minutes"),
    (("--pool", "tmp"), "--pool cannot be combined with --minutes")))
def test_what_does_not_go_with_minutes(nsgf, words, message):
    fails(nsgf("train", "digits", "--minutes", "1", *words), message)


@pytest.mark.parametrize("minutes", ("0", "-1", "nan", "inf", "soon"))
def test_minutes_are_a_positive_number(nsgf, minutes):
    code, _, err = nsgf("train", "digits", "--minutes", minutes)
    assert code == 2 and "--minutes" in err[-1] and minutes in err[-1]


def test_a_classifier_by_the_clock(tmp_path):
    from nsgf_nb.bench.classifiers import train_classifiers
    args = SimpleNamespace(name="classifier-digits", seeds=[0], out=tmp_path, device="cpu")
    train_classifiers(args, Deadline(3))
    folder = tmp_path/"classifier-digits-timed"/"seed0"
    assert {"classifier.safetensors", "training.checkpoint"} <= {p.name for p in folder.iterdir()}
