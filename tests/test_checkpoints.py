"""Checkpoints: resumed to the same bits; one process for each run; signals, disks and numbers."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nsgf_nb
from nsgf_nb.files import load_tensors, save_tensors
from nsgf_nb.flow_matching import FlowMatching
from nsgf_nb.mlp import MLP
from nsgf_nb.nsgf import NSGF
from nsgf_nb.runs.checkpoints import (
    Checkpoint,
    LongRun,
    Terminated,
    check_disk_space,
    defer_signals,
    file_lock,
)
from nsgf_nb.targets import sample_2d
from nsgf_nb.training import Loop, Steps, Trainer, seeded

TINY = dict(width=16, depth=2, batch_size=64, train_steps=30, device="cpu")
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | dict(
    OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]))


def moons(seed=0):
    return sample_2d("moons", 500, seed)


def same_weights(a, b):
    pairs = zip(a.net.state_dict().values(), b.net.state_dict().values())
    return all(torch.equal(u, v) for u, v in pairs)


class Stream:
    "Data from a generator of its own. A signal can come at a draw; the state may be hidden."

    def __init__(self, signal_at=None, number=signal.SIGTERM, has_state=True):
        self.generator = torch.Generator().manual_seed(5)
        self.signal_at = signal_at
        self.number = number
        self.draws = 0
        if has_state:
            self.get_state = self.generator.get_state
            self.set_state = self.generator.set_state

    def __call__(self, n):
        self.draws += 1
        if self.draws == self.signal_at:
            os.kill(os.getpid(), self.number)
        return sample_2d("moons", n, self.generator)


class Draws:
    "Batches whose generator goes into the checkpoint; one can be NaN; `before(i)` is called."

    def __init__(self, spoil=None, before=None):
        self.generator = torch.Generator().manual_seed(0)
        self.count = 0
        self.spoil = spoil
        self.before = before

    def __iter__(self):
        return self

    def __next__(self):
        if self.before is not None:
            self.before(self.count)
        x = torch.randn(16, 2, generator=self.generator)
        target = x*math.nan if self.count == self.spoil else x
        self.count += 1
        return x, torch.zeros(16), target

    def state_dict(self):
        return {"generator": self.generator.get_state(), "count": torch.tensor(self.count)}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.count = int(state["count"])


def trainer(steps=20, batches=None, **settings):
    with seeded(0):
        return Trainer(MLP((2,), 8, 1), batches or Draws(), steps, settings=settings)


def run(path, steps=20, batches=None, interval=60., **settings):
    with torch.random.fork_rng():
        return LongRun(path, interval)(trainer(steps, batches, **settings), progress=False)


# ---- the two files

def write_steps(path, *steps):
    checkpoint = Checkpoint(path)
    checkpoint.read()
    for step in steps:
        checkpoint.write({"w": torch.full((3,), float(step))}, {"step": step})
    return checkpoint


def test_the_last_two_are_kept(tmp_path):
    checkpoint = write_steps(tmp_path/"c", 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.before"]
    assert checkpoint.read()[1]["step"] == 3
    assert load_tensors(checkpoint.before)[1]["step"] == 2
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.read() is None


@pytest.mark.parametrize("content", (b"", b"junk", None))
def test_a_damaged_one_is_skipped_and_never_replaces_a_good_one(tmp_path, content):
    checkpoint = write_steps(tmp_path/"c", 1, 2)
    if content is None:
        checkpoint.path.unlink()
    else:
        checkpoint.path.write_bytes(content)
    again = Checkpoint(checkpoint.path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert again.read()[1]["step"] == 1
    assert len(caught) == (content is not None)
    assert all(str(checkpoint.path) in str(warning.message) for warning in caught)
    again.write({"w": torch.ones(1)}, {"step": 3})
    steps = [load_tensors(path)[1]["step"] for path in (checkpoint.path, checkpoint.before)]
    assert steps == [3, 1]


def test_two_damaged_files_are_both_named(tmp_path):
    checkpoint = write_steps(tmp_path/"c", 1, 2)
    for path in (checkpoint.path, checkpoint.before):
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"{tmp_path}/c is not .*{tmp_path}/c.before is not"):
        Checkpoint(checkpoint.path).read()


def test_a_file_of_another_kind(tmp_path):
    save_tensors(tmp_path/"c", {"w": torch.ones(1)}, dict(model="NSGF"))
    with pytest.raises(ValueError, match=f"{tmp_path}/c is not a checkpoint"):
        run(tmp_path/"c")


# ---- locks

def in_thread(function):
    "The error of a call in another thread; None if there was none."
    errors = []

    def call():
        try:
            function()
        except RuntimeError as error:
            errors.append(str(error))
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return errors[0] if errors else None


HOLD = """
import sys, time
from nsgf_nb.runs.checkpoints import file_lock
with file_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_process_gets_an_error_and_a_killed_one_holds_nothing(tmp_path):
    path = tmp_path/"c"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE,
                              text=True, cwd=ROOT, env=ENVIRONMENT)
    assert holder.stdout.readline() == "held\n"
    in_use = f"{path} is in use by another process"
    with pytest.raises(RuntimeError, match=in_use), file_lock(path):
        pass
    with pytest.raises(RuntimeError, match=in_use):
        FlowMatching(**TINY).fit(moons(), progress=False, loop=LongRun(path))
    holder.kill()
    holder.wait()
    FlowMatching(**TINY).fit(moons(), progress=False, loop=LongRun(path))


def test_the_lock_is_taken_before_the_work_and_released_after_it(tmp_path):
    path = tmp_path/"c"
    loop = LongRun(path)
    assert loop.steps_done() == 0
    assert "in use by another process" in in_thread(LongRun(path).steps_done)
    loop(trainer(), progress=False)
    assert in_thread(LongRun(path).steps_done) is None
    assert LongRun(path).steps_done() == 20


@pytest.mark.parametrize("call", (LongRun.steps_done, lambda loop: loop(trainer())))
def test_the_lock_is_released_after_an_error(tmp_path, call):
    path = tmp_path/"c"
    path.write_bytes(b"junk")
    loop = LongRun(path)
    with pytest.raises(ValueError, match=f"{path} is not"):
        call(loop)
    path.unlink()
    assert in_thread(LongRun(path).steps_done) is None


# ---- signals

@pytest.mark.parametrize("number, kind",
                         ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)))
def test_a_signal_waits_for_the_end_of_the_step_and_the_same_call_resumes(tmp_path, number, kind):
    path = tmp_path/"c"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    whole = FlowMatching(**TINY).fit(Stream(), progress=False)
    model = FlowMatching(**TINY)
    stream = Stream(signal_at=14, number=number)  # the first draw is for the scale
    with pytest.raises(kind, match="13 of 30 steps"):
        model.fit(stream, progress=False, loop=LongRun(path))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert len(load_tensors(path)[0]["losses"]) == 13
    assert model.sample(5).isfinite().all()
    model.fit(Stream(), progress=False, loop=LongRun(path))
    assert same_weights(model, whole)
    assert torch.equal(model.losses, whole.losses)


def test_a_second_signal_does_not_wait():
    with pytest.raises(KeyboardInterrupt), defer_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == [KeyboardInterrupt]
        os.kill(os.getpid(), signal.SIGTERM)


def test_two_signals_end_a_run_without_a_checkpoint_of_half_a_step(tmp_path):
    def interrupt(i):
        if i == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
    result = run(tmp_path/"c", batches=Draws(before=interrupt), interval=0.)
    assert result.interrupted is KeyboardInterrupt
    assert len(load_tensors(tmp_path/"c")[0]["losses"]) == 7


def test_it_runs_in_any_thread(tmp_path):
    assert in_thread(lambda: run(tmp_path/"c")) is None
    assert LongRun(tmp_path/"c").steps_done() == 20


@pytest.mark.slow
@pytest.mark.parametrize("number, code", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_the_command_ends_with_the_code_of_the_signal(tmp_path, number, code):
    command = [sys.executable, "-m", "nsgf_nb", "train", "2d-moons", "--device", "cpu",
               "--out", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          cwd=ROOT, env=ENVIRONMENT) as process:
        assert process.stdout.readline()  # it has begun
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "nsgf: interrupted" in err and "Traceback" not in err


# ---- resuming

@pytest.mark.parametrize("has_state", (True, False))
def test_a_stream_continues_where_it_was_if_it_has_a_state(tmp_path, has_state):
    whole = FlowMatching(**TINY).fit(Stream(), progress=False)
    stream = Stream(signal_at=14, has_state=has_state)
    with pytest.raises(Terminated):
        FlowMatching(**TINY).fit(stream, progress=False, loop=LongRun(tmp_path/"c"))
    stream = Stream(has_state=has_state)
    resumed = FlowMatching(**TINY).fit(stream, progress=False, loop=LongRun(tmp_path/"c"))
    assert same_weights(resumed, whole) == has_state


def test_a_pool_in_memory_is_built_again_and_a_complete_run_needs_none(tmp_path):
    settings = TINY | dict(pool_size=1024, minibatch=64)
    whole = NSGF(**settings).fit(moons(), progress=False)
    first = NSGF(**settings).fit(moons(), progress=False, loop=LongRun(tmp_path/"c"))

    class NoPool:
        def build(self, *args):
            raise AssertionError("a complete run builds no pool")
    again = NSGF(**settings)
    again.fit(moons(), progress=False, loop=LongRun(tmp_path/"c"), pool=NoPool())
    assert same_weights(first, whole) and same_weights(again, whole)
    assert again.seconds["pool"] == first.seconds["pool"]


def test_seconds_and_phases_of_before_are_restored(tmp_path):
    path = tmp_path/"c"
    write = Checkpoint(path).write
    earlier = trainer()
    for _ in range(5):
        next(earlier)
    versions = dict(nsgf_nb=nsgf_nb.__version__, torch=torch.__version__)
    write(earlier.state_dict(), dict(settings=dict(steps=20), versions=versions, seconds=1000.,
                                     phases=dict(pool=7.)))
    later = trainer()
    later.phases = dict(pool=1., other=2.)
    result = LongRun(path)(later, progress=False)
    assert 1000 < result.seconds < 1060
    assert later.phases == dict(pool=7., other=2.)
    assert len(result.losses) == 20


def test_progress_says_where_it_resumes(tmp_path, capsys):
    path = tmp_path/"c"

    def interrupt(i):
        if i == 7:
            os.kill(os.getpid(), signal.SIGINT)
    LongRun(path)(trainer(batches=Draws(before=interrupt)))
    assert f"stopped after 8 of 20 steps; step 7 is in {path}" in capsys.readouterr().out
    LongRun(path)(trainer())
    assert "8 of 20" in capsys.readouterr().out


def test_other_settings_and_other_data_are_named(tmp_path):
    run(tmp_path/"c", lr=.1, name="a")
    with pytest.raises(ValueError, match=f"{tmp_path}/c .*lr=0.1, not 0.2; steps=20, not 30"):
        run(tmp_path/"c", steps=30, lr=.2, name="a")
    FlowMatching(**TINY).fit(moons(), progress=False, loop=LongRun(tmp_path/"d"))
    other = moons()
    other[7, 0] += 1e-4
    with pytest.raises(ValueError, match="d is a checkpoint of another run, with data="):
        FlowMatching(**TINY).fit(other, progress=False, loop=LongRun(tmp_path/"d"))


def test_another_version_causes_a_warning(tmp_path, monkeypatch):
    run(tmp_path/"c")
    monkeypatch.setattr(nsgf_nb, "__version__", "9.9")
    with pytest.warns(UserWarning, match="nsgf_nb='.*', not '9.9'"):
        run(tmp_path/"c")


JUNK = (None, "x", [], {}, {"a": []}, -1, "9"*400)


@pytest.mark.parametrize("name", ("settings", "versions", "seconds", "phases"))
def test_descriptions_with_junk_raise_an_error_that_names_the_file(tmp_path, name):
    run(tmp_path/"c")
    tensors, about = load_tensors(tmp_path/"c")
    about.pop("format")
    for junk in JUNK:
        if (name, junk) in (("phases", {}), ("seconds", -1), ("seconds", "9"*400)):
            continue  # these make sense
        save_tensors(tmp_path/"junk", tensors, {**about, name: junk}, readable=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (name, junk) in (("versions", {}), ("versions", {"a": []})):
                run(tmp_path/"junk")  # of an unknown version: only a warning
                continue
            with pytest.raises(ValueError, match=f"{tmp_path}/junk (does not hold|is a checkp)"):
                run(tmp_path/"junk")


@pytest.mark.parametrize("change", (
    dict(losses=None), dict(losses=torch.zeros(())), dict(losses=torch.zeros(21)),
    {"net.layers.0.weight": None}, {"net.layers.0.weight": torch.zeros(3)},
    {"optimiser.0.exp_avg": torch.zeros(3)}, {"optimiser.99.exp_avg": torch.zeros(3)},
    {"optimiser.x": torch.zeros(3)}, dict(rng=torch.zeros(3)), {"batches.generator": None},
), ids=str)
def test_tensors_that_do_not_fit_raise_an_error_that_names_the_file(tmp_path, change):
    run(tmp_path/"c")
    tensors, about = load_tensors(tmp_path/"c")
    about.pop("format")
    tensors = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    save_tensors(tmp_path/"c", tensors, about, readable=False)
    with torch.random.fork_rng(), pytest.raises(ValueError, match=f"{tmp_path}/c does not hold"):
        loop = LongRun(tmp_path/"c")
        loop.steps_done()
        loop(trainer(), progress=False)


class Counter(Steps):
    "No trainer: it counts, and its state lags behind."

    def __init__(self, steps):
        super().__init__(steps, torch.device("cpu"))
        self.net = torch.nn.Linear(1, 1)
        self.average = SimpleNamespace(module=self.net)

    def __next__(self):
        self.record(float(self.step))
        return self.losses[-1]

    def state_dict(self):  # a stage has four steps
        return {"losses": self.losses[:self.step//4*4]}

    def load_state_dict(self, state):
        self.load_losses(state["losses"])


def test_any_steps_run(tmp_path):
    loop = LongRun(tmp_path/"c", 0.)
    assert len(loop(Counter(7), progress=False).losses) == 7
    assert LongRun(tmp_path/"c").steps_done() == 4
    assert len(LongRun(tmp_path/"c")(Counter(7), progress=False).losses) == 7


def test_steps_that_are_done_early_stop_the_run(tmp_path):
    class Early(Counter):
        @property
        def done(self):
            return self.step == 3
    for _ in range(2):  # the second time from the checkpoint
        assert len(LongRun(tmp_path/"c", 0.)(Early(7), progress=False).losses) == 3


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(None)
    assert torch.equal(result.losses, Loop()(trainer(), progress=False).losses)
    assert LongRun(None).steps_done() == 0
    assert list(tmp_path.iterdir()) == []


# ---- bad numbers and bad disks

def test_a_nan_loss_leaves_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=f"after step 9: .*step 8 is in {tmp_path}/c"):
        run(tmp_path/"c", batches=Draws(spoil=9), interval=0.)
    tensors, _ = load_tensors(tmp_path/"c")
    assert len(tensors["losses"]) == 9
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    batches = Draws(spoil=9)
    with pytest.raises(FloatingPointError, match="loss is nan at step 9"):
        run(tmp_path/"d", batches=batches)
    assert batches.count == 11  # one step later, which a GPU needs to have the number ready


def test_bad_weights_are_not_written_over_good_ones(tmp_path):
    spoiled = trainer(batches=Draws())

    def spoil(i):
        if i == 5:  # the loss of this step does not show it
            spoiled.net.layers[-1].bias.data[0] = math.inf
            spoiled.net.layers[-1].bias.requires_grad_(False)
    spoiled.batches.before = spoil
    spoiled.loss = lambda net, x, t, target: net.layers[0].weight.square().sum()
    with pytest.raises(FloatingPointError, match=f"after step 5: .*step 4 is in {tmp_path}/c"):
        LongRun(tmp_path/"c", 0.)(spoiled, progress=False)
    assert len(load_tensors(tmp_path/"c")[0]["losses"]) == 5


def test_a_disk_without_room_is_noticed_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    batches = Draws()
    with pytest.raises(OSError, match=f"{tmp_path} needs .* MB for c, .* 0.1 MB"):
        run(tmp_path/"c", batches=batches)
    assert batches.count == 0
    check_disk_space(tmp_path/"c", 10**5)


def test_a_disk_that_fails_in_the_middle_costs_checkpoints_not_the_training(tmp_path, monkeypatch):
    sync = os.fsync
    calls = []

    def failing(number):
        calls.append(number)
        if 3 < len(calls) < 9:
            raise OSError(28, "No space left on device")
        return sync(number)
    monkeypatch.setattr(os, "fsync", failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(tmp_path/"c", steps=12, interval=0.)
    assert len(result.losses) == len(load_tensors(tmp_path/"c")[0]["losses"]) == 12
    assert any("No space left" in str(warning.message) for warning in caught)
    assert list(tmp_path.glob("*.tmp")) == []


def test_the_settings_in_a_checkpoint_are_json(tmp_path):
    run(tmp_path/"c", sizes=(1, 2), name="ä")
    about = load_tensors(tmp_path/"c")[1]
    assert about["settings"] == dict(sizes=[1, 2], name="ä", steps=20)
    assert json.dumps(about)


def test_a_fit_that_fails_before_its_first_step_releases_the_lock(tmp_path):
    loop = LongRun(tmp_path/"c")
    model = FlowMatching(train_steps=5, batch_size=8, width=8, depth=1, device="cpu")

    def broken(sampler, progress, **options):
        raise ValueError("no batches")
    model.make_batches = broken
    with pytest.raises(ValueError, match="no batches"):
        model.fit(sample_2d("moons", 100, 0), progress=False, loop=loop)
    with file_lock(tmp_path/"c"):  # another could take it now
        pass
