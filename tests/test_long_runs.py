"""Long runs: checkpoints that are whole, one process for each, signals that wait, numbers and disks that go wrong."""
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import nsgf_nb.files as files
import nsgf_nb.long_runs as long_runs
import nsgf_nb.matching as matching
from nsgf_nb.data import sample_2d
from nsgf_nb.files import load_tensors, save_tensors
from nsgf_nb.flow import particle_flow
from nsgf_nb.long_runs import Checkpoint, Terminated, locked, stopping
from nsgf_nb.matching import fit
from nsgf_nb.models import MLP
from nsgf_nb.nsgfpp import StraightFlow

TINY = dict(width=16, depth=2, batch_size=64, train_steps=30, device="cpu")
root = Path(__file__).resolve().parent.parent


def state(model): return model.net.state_dict()
def same(a, b): return all(torch.equal(u, v) for u, v in zip(state(a).values(), state(b).values()))


def batches(seed=0, spoil=None):
    "Batches without end, the one of number `spoil` without a number in it."
    g = torch.Generator().manual_seed(seed)
    for i in range(10**6):
        x = torch.randn(16, 2, generator=g)
        yield x, torch.zeros(16), x*(math.nan if i == spoil else 1)


# ---- files

def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path):
    tensors, about = {"a": torch.randn(20), "b.c": torch.arange(3)}, dict(model="x", steps=[1, 2], text="ä")
    save_tensors(tmp_path/"m", tensors, about, beside=False)
    whole, r, found = (tmp_path/"m").read_bytes(), random.Random(0), 0
    for i in r.sample(range(8*len(whole)), 400):
        content = bytearray(whole); content[i//8] ^= 1 << i % 8
        (tmp_path/"m").write_bytes(content)
        try: t, a = load_tensors(tmp_path/"m")
        except ValueError as e: assert str(tmp_path/"m") in str(e); found += 1
        else: assert a == dict(about, format="nsgf_nb/2") and all(torch.equal(t[k], tensors[k]) for k in tensors)
    assert found > 380                                                 # the rest falls on white space of the header


def test_files_of_the_first_format_are_still_read():
    assert load_tensors(files.shipped("mnist"))[1]["format"] == "nsgf_nb/1"


# ---- checkpoints

def write(path, *steps):
    c = Checkpoint(path)
    c.read()
    for i in steps: c.write(dict(w=torch.full((3,), float(i))), dict(step=i))
    return c


def test_the_last_two_are_kept(tmp_path):
    c = write(tmp_path/"c", 1, 2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.before"]
    assert c.read()[1]["step"] == 3 and load_tensors(c.before)[1]["step"] == 2
    c.remove()
    assert list(tmp_path.iterdir()) == [] and c.read() is None


@pytest.mark.parametrize("content", (b"", b"junk", None))
def test_a_broken_one_is_passed_over_and_never_takes_the_place_of_a_good_one(tmp_path, content):
    c = write(tmp_path/"c", 1, 2)
    if content is None: c.path.unlink()
    else: c.path.write_bytes(content)
    again = Checkpoint(c.path)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert again.read()[1]["step"] == 1
    assert len(found) == (content is not None) and all(str(c.path) in str(w.message) for w in found)
    again.write(dict(w=torch.ones(1)), dict(step=3))
    assert load_tensors(c.path)[1]["step"] == 3 and load_tensors(c.before)[1]["step"] == 1


def test_two_broken_ones_are_named(tmp_path):
    c = write(tmp_path/"c", 1, 2)
    for path in (c.path, c.before): path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="c is not a whole .*c.before is not a whole"): Checkpoint(c.path).read()


# ---- locks

HOLD = "import sys, time; from nsgf_nb.long_runs import locked\nwith locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path/"run"], stdout=subprocess.PIPE, text=True, cwd=root)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match=f"{tmp_path/'run'} is in use by another process"): locked(tmp_path/"run").__enter__()
    with pytest.raises(RuntimeError, match="in use by another process"): StraightFlow(**TINY).fit(sample_2d("moons", 100), progress=False, checkpoint=tmp_path/"run")
    other.kill(); other.wait()
    StraightFlow(**TINY).fit(sample_2d("moons", 100), progress=False, checkpoint=tmp_path/"run")


# ---- signals

@pytest.mark.parametrize("number, kind", ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)))
def test_a_signal_waits_for_the_end_of_the_step_and_the_same_call_goes_on(tmp_path, monkeypatch, number, kind):
    data, whole, step = sample_2d("moons", 500, 0), StraightFlow(**TINY).fit(sample_2d("moons", 500, 0), progress=False), matching._Run.step
    def signalled(self):
        if len(self.losses) == 12: os.kill(os.getpid(), number)        # before the step has begun
        return step(self)
    monkeypatch.setattr(matching._Run, "step", signalled)
    model = StraightFlow(**TINY)
    with pytest.raises(kind, match=f"stopped after 13 of 30 steps; the model keeps what it has learned, and {tmp_path/'c'} where to go on"):
        model.fit(data, progress=False, checkpoint=tmp_path/"c")
    assert len(load_tensors(tmp_path/"c")[0]["losses"]) == 13 and model.sample(5).isfinite().all()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None) or signal.getsignal(signal.SIGTERM).__module__ != "nsgf_nb.long_runs"
    assert same(StraightFlow(**TINY).fit(data, progress=False, checkpoint=tmp_path/"c"), whole)


def test_a_second_signal_does_not_wait():
    with pytest.raises(KeyboardInterrupt):
        with stopping() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop == [KeyboardInterrupt]
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.parametrize("number, code", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_the_command_ends_with_the_code_of_the_signal(tmp_path, number, code):
    command = [sys.executable, "-m", "nsgf_nb", "train", "2d-moons", "--out", tmp_path, "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | dict(OMP_NUM_THREADS="1")) as run:
        assert "measuring the floors" in run.stdout.readline()
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
    assert run.returncode == code and "nsgf: interrupted" in err and "Traceback" not in err


# ---- what a run goes on with

class Stream:
    "Draws of a generator of its own, whose state can be kept."
    def __init__(self, state=True):
        self.g = torch.Generator().manual_seed(5)
        if state: self.get_state, self.set_state = self.g.get_state, self.g.set_state
    def __call__(self, n): return sample_2d("moons", n, self.g)


def test_a_stream_goes_on_where_it_was(tmp_path, monkeypatch):
    whole, step = StraightFlow(**TINY).fit(Stream(), progress=False), matching._Run.step
    def stopped(self):
        if len(self.losses) == 12: os.kill(os.getpid(), signal.SIGTERM)
        return step(self)
    monkeypatch.setattr(matching._Run, "step", stopped)
    for state in (True, False):
        with pytest.raises(Terminated): StraightFlow(**TINY).fit(Stream(state), progress=False, checkpoint=tmp_path/str(state))
    monkeypatch.undo()
    assert same(StraightFlow(**TINY).fit(Stream(), progress=False, checkpoint=tmp_path/"True"), whole)
    assert not same(StraightFlow(**TINY).fit(Stream(False), progress=False, checkpoint=tmp_path/"False"), whole)    # no one can know where that one was


def test_other_data_are_refused_and_other_versions_are_named(tmp_path, monkeypatch):
    data = sample_2d("moons", 500, 0)
    StraightFlow(**TINY).fit(data, progress=False, checkpoint=tmp_path/"c")
    other = data.clone(); other[7, 0] += 1e-4
    with pytest.raises(ValueError, match="c is a checkpoint of another run, with data="): StraightFlow(**TINY).fit(other, progress=False, checkpoint=tmp_path/"c")
    monkeypatch.setattr(long_runs, "_versions", lambda: dict(nsgf_nb="9.9", torch=torch.__version__))
    with pytest.warns(UserWarning, match="was made by nsgf_nb .*, not 9.9"): StraightFlow(**TINY).fit(data, progress=False, checkpoint=tmp_path/"c")


# ---- what goes wrong

def test_a_bad_loss_stops_within_a_step_and_leaves_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step 9: try .*; step 8 is in {tmp_path/'c'}|no longer finite after step 9: try .*; step 8 is in {tmp_path/'c'}"):
        fit(MLP((2,), 8, 1), batches(spoil=9), 100, progress=False, checkpoint=tmp_path/"c", every=0.)
    tensors, _ = load_tensors(tmp_path/"c")
    assert len(tensors["losses"]) == 9 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    taken = []
    with pytest.raises(FloatingPointError, match="the loss is nan at step 9"):
        fit(MLP((2,), 8, 1), (taken.append(1) or b for b in batches(spoil=9)), 100, progress=False)
    assert len(taken) == 11                                             # the step after, no more


def test_bad_weights_are_not_written_over_good_ones(tmp_path, monkeypatch):
    step = matching._Run.step
    def spoiled(self):
        step(self)
        if len(self.losses) == 6: next(self.net.parameters()).data[0] = math.inf      # the loss does not know yet
    monkeypatch.setattr(matching._Run, "step", spoiled)
    with pytest.raises(FloatingPointError, match=f"no longer finite after step 5: try .*; step 4 is in {tmp_path/'c'}"):
        fit(MLP((2,), 8, 1), batches(), 100, progress=False, checkpoint=tmp_path/"c", every=0.)
    assert len(load_tensors(tmp_path/"c")[0]["losses"]) == 5


def test_out_of_memory_names_the_batch_size_that_would_fit():
    class Greedy(MLP):
        def forward(self, x, t):
            if len(x) > 20: raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
            return super().forward(x, t)
    big = ((torch.zeros(96, 2), torch.zeros(96), torch.zeros(96, 2)) for _ in range(9))
    with pytest.raises(MemoryError, match="^batch_size=96 needs more memory than there is: 12 would fit$"): fit(Greedy((2,), 8, 1), big, 5, progress=False)


def test_other_errors_of_a_step_are_as_they_are():
    with pytest.raises(RuntimeError, match="mat1 and mat2|must be of shape|size"): fit(MLP((2,), 8, 1), ((torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 3)) for _ in range(9)), 5, progress=False)


def test_a_disk_without_room_is_found_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(long_runs.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=10**5)))
    taken = []
    with pytest.raises(OSError, match=f"{tmp_path} needs .* MB for c, but its disk has 0.1 MB left"):
        fit(MLP((2,), 8, 1), (taken.append(1) or b for b in batches()), 5, progress=False, checkpoint=tmp_path/"c")
    assert not taken


def test_a_disk_that_fails_in_between_costs_checkpoints_not_the_training(tmp_path, monkeypatch):
    calls, sync = [], os.fsync
    def failing(number):
        calls.append(number)
        if 3 < len(calls) < 9: raise OSError(28, "No space left on device")
        return sync(number)
    whole = fit(MLP((2,), 8, 1), batches(), 12, progress=False)
    monkeypatch.setattr(os, "fsync", failing)
    with torch.random.fork_rng(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        kept = fit(MLP((2,), 8, 1), batches(), 12, progress=False, checkpoint=tmp_path/"c", every=0.)
    assert kept.losses.shape == whole.losses.shape and any("the training goes on: [Errno 28] No space left" in str(w.message) for w in found)
    assert len(load_tensors(tmp_path/"c")[0]["losses"]) == 12 and list(tmp_path.glob("*.tmp")) == []


def test_a_flow_that_runs_away_names_the_step(monkeypatch):
    import nsgf_nb.flow as flow
    calls = []
    def wrong(x, *args, **kw):
        calls.append(1)
        return (10*x if len(calls) == 3 else 0*x), (None, None)
    monkeypatch.setattr(flow, "velocity", wrong)
    with pytest.raises(FloatingPointError, match=r"the flow diverges at Euler step 2 \(eta=0.5, blur=0.1\)"):
        particle_flow(torch.randn(64, 2), torch.randn(64, 2), .1, .5, steps=5, self_term="masked")
