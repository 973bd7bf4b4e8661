"""Several processes over gloo on this machine's CPU: the same run as on one, and a clear end."""
import atexit
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsgf_nb.files import load_tensors, read_json, save_tensors
from nsgf_nb.flow_matching import FlowMatching
from nsgf_nb.nsgf import NSGF
from nsgf_nb.runs.checkpoints import LongRun
from nsgf_nb.runs.disk_pool import DiskPool
from nsgf_nb.runs.distributed import (
    DistributedRun,
    Ranks,
    SharedDiskPool,
    SharedPool,
    each,
    explain_lost_rank,
    ranks,
    sample,
)
from nsgf_nb.runs.minutes import Deadline, TimedRun
from nsgf_nb.targets import sample_2d

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | dict(
    OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]))
TINY = dict(width=16, depth=2, batch_size=64, train_steps=20, device="cpu")

# ---- what several processes do: this file is also their program

def train(out):
    "Three models with checkpoints; their weights and samples go to files."
    here = ranks()
    moons = sample_2d("moons", 2000, 0)
    settings = dict(width=32, depth=2, batch_size=128, train_steps=60, device="cpu")
    pooled = dict(settings, pool_size=2**13, pool_mb=1, minibatch=64)
    runs = dict(memory=(NSGF(**pooled), dict(pool=SharedPool())),
                disk=(NSGF(**pooled), dict(pool=SharedDiskPool(out/"pool"))),
                fm=(FlowMatching(**settings), dict()))
    for name, (model, options) in runs.items():
        loop = DistributedRun(out/f"{name}.checkpoint")
        model.fit(moons, progress=False, loop=loop, **options)
        x, nfe = sample(model, 5001, seed=3, return_nfe=True)
        if here.main:
            tensors = dict(model.net.state_dict(), x=x, nfe=nfe)
            save_tensors(out/name, tensors, dict(ranks=here.count))


def share_and_stop(out):
    "Results of `each`, a batch that does not divide, and a signal to one rank."
    pairs = list(each(lambda n: (torch.arange(n), torch.tensor(n/2)), range(5)))
    assert [len(a) for a, _ in pairs] == list(range(5))
    assert pairs[3][1] == 1.5
    model = FlowMatching(**TINY | dict(batch_size=63))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 ranks, got 63"):
        model.fit(noise(), progress=False, loop=DistributedRun())

    def untouched(n):
        raise AssertionError("the data were read before the settings were checked")
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 ranks, got 63"):
        model.fit(untouched, progress=False, loop=DistributedRun())
    moons = sample_2d("moons", 400, 0)
    words = ["left" if x < 0 else "right" for x in moons[:, 0]]
    words[0] = words[1] = words[2] = "first"
    classes = FlowMatching(**TINY).fit(moons, condition=words, progress=False,
                                       loop=DistributedRun())
    alone = classes.sample(9, seed=4)
    assert torch.allclose(alone, sample(classes, 9, seed=4), atol=1e-6)
    asked = classes.conditions.some(9, 1)
    assert torch.allclose(classes.sample(9, condition=asked), sample(classes, 9, condition=asked),
                          atol=1e-6)
    data = noise(stop_at=8)
    with pytest.raises(KeyboardInterrupt) as caught:
        long_model().fit(data, progress=False, loop=DistributedRun(out/"c"))
    print(f"rank {ranks().index}: {caught.value}", flush=True)


def lose_a_rank(out):
    long_model().fit(noise(die_at=6), progress=False, loop=DistributedRun(out/"c", 0.))


def long_model():
    return FlowMatching(**TINY | dict(train_steps=5000))


def noise(stop_at=None, die_at=None):
    "Random data; at a draw, rank 1 receives a signal, or dies."
    draws = []

    def draw(n):
        draws.append(n)
        if ranks().index == 1 and len(draws) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        if ranks().index == 1 and len(draws) == die_at:
            os._exit(3)
        return torch.randn(n, 2)
    return draw


def list_threads_at_exit(out):
    "After a training, and after the ranks have left each other: the threads of this process."
    atexit.register(lambda: print("threads:", *thread_names(), flush=True))
    here = ranks()
    FlowMatching(**TINY).fit(noise(), progress=False, loop=DistributedRun())
    assert here.count == 2 and any("gloo" in name for name in thread_names())


def thread_names():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def use_accelerate(out):
    from accelerate import debug_launcher
    debug_launcher(train_and_save, (out,), num_processes=2)


def train_and_save(out):
    model = FlowMatching(**TINY)
    model.fit(sample_2d("moons", 500, 0), progress=False, loop=DistributedRun(out/"c"))
    if ranks().main:
        model.save(out/"m", ranks=ranks().count)


def start(*words, count=2, succeeds=True):
    "Start a program in so many processes; what they print."
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command = [sys.executable, *(launcher if count > 1 else []), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=ENVIRONMENT)
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- several processes

@pytest.mark.slow
def test_two_ranks_do_what_one_does(tmp_path):
    "Weights, samples, pool and losses agree up to the order of summation."
    for n in "12":
        (tmp_path/n).mkdir()
    train(tmp_path/"1")
    start(__file__, "train", tmp_path/"2")
    for name in ("memory", "fm", "disk"):
        one, about_one = load_tensors(tmp_path/"1"/name)
        two, about_two = load_tensors(tmp_path/"2"/name)
        assert (about_one["ranks"], about_two["ranks"]) == (1, 2)
        assert one["x"].shape == (5001, 2)
        assert torch.equal(one["nfe"], two["nfe"])
        for key in one:
            assert torch.allclose(one[key].double(), two[key].double(), atol=1e-4), (name, key)
        losses = [load_tensors(tmp_path/n/f"{name}.checkpoint")[0]["losses"] for n in "12"]
        assert torch.allclose(*losses, rtol=1e-4)
    shards = sorted((tmp_path/"1"/"pool").glob("*.safetensors"))
    assert len(shards) == 4
    for path in shards:
        assert path.read_bytes() == (tmp_path/"2"/"pool"/path.name).read_bytes()
    train(tmp_path/"2")  # one process resumes what two have written
    resumed, about = load_tensors(tmp_path/"2"/"disk")
    assert about["ranks"] == 1
    assert torch.equal(resumed["layers.0.weight"], two["layers.0.weight"])


@pytest.mark.slow
def test_ranks_share_work_and_stop_together(tmp_path):
    output = start(__file__, "share_and_stop", tmp_path)
    for rank in range(2):
        assert f"rank {rank}: stopped after 7 of 5,000 steps" in output
    assert len(load_tensors(tmp_path/"c")[0]["losses"]) == 7


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to list threads")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    "Such a thread, with a tensor in hand at the end of Python, aborts the process."
    lines = start(__file__, "list_threads_at_exit", tmp_path).splitlines()
    threads = [line for line in lines if line.startswith("threads:")]
    assert len(threads) == 2 and not any("gloo" in line for line in threads), threads


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_a_clear_message(tmp_path):
    output = start(__file__, "lose_a_rank", tmp_path, succeeds=False)
    assert "rank 0 of 2 has lost another rank, which died: see what that one printed; step " \
        in output
    assert len(load_tensors(tmp_path/"c")[0]["losses"]) in (3, 4, 5)


def by_the_clock(out):
    "A pool that is cut short and a training; both ranks must stop at the same place."
    deadline = Deadline(4)
    pool = SharedPool()
    model = NSGF(**TINY | dict(pool_size=2**18, minibatch=64, pool_seconds=.5))
    run = TimedRun(out/"c", deadline)
    model.fit(sample_2d("moons", 500, 0), progress=False, loop=run, pool=pool)
    weights = sum(w.double().abs().sum() for w in model.net.parameters()).item()
    print(f"rank {ranks().index}: {len(pool)} {len(model.losses)} {weights:.10f}", flush=True)
    assert deadline.left() > -60


@pytest.mark.slow
def test_two_ranks_stop_by_the_clock_at_the_same_step(tmp_path):
    output = start(__file__, "by_the_clock", tmp_path)
    first, second = (re.search(f"rank {i}: (.*)", output)[1].split() for i in range(2))
    assert first == second
    paths, steps = int(first[0]), int(first[1])
    assert 64 <= paths < 2**18 and steps > 20
    assert len(load_tensors(tmp_path/"c")[0]["losses"]) == steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ("digits", "digits-one-call"))
def test_images_on_two_ranks_by_the_clock(tmp_path, name):
    start("-m", "nsgf_nb", "train", name, "--quick", "--minutes", ".4", "--out", tmp_path)
    result = read_json(tmp_path/f"{name}-timed"/"seed0"/"result.json")
    assert {"floor", "real", "nfe"} <= result["measured"].keys()


@pytest.mark.slow
def test_the_command_line_on_two_ranks(tmp_path):
    "Only rank 0 writes and prints."
    output = start("-m", "nsgf_nb", "train", "digits", "--quick", "--out", tmp_path)
    assert output.count("wrote ") == 1
    assert read_json(tmp_path/"digits"/"seed0"/"result.json")["measured"]["nfe"]


@pytest.mark.slow
def test_accelerate_starts_the_ranks_of_a_notebook(tmp_path):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    start(__file__, "use_accelerate", tmp_path, count=1)
    assert load_tensors(tmp_path/"m")[1]["ranks"] == 2


# ---- one process

def test_one_process_is_rank_0_of_1():
    here = ranks()
    assert (here.index, here.count, here.main) == (0, 1, True)
    here.wait()
    assert list(each(torch.neg, torch.arange(3))) == [0, -1, -2]


def test_a_batch_is_cut_into_equal_parts():
    x = torch.arange(6)
    assert [Ranks(i, 3).share((x, x))[1].tolist() for i in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 4 ranks, got 6"):
        Ranks(0, 4).share((x,))


def test_on_one_process_everything_is_what_it_is_without_ranks(tmp_path):
    moons = sample_2d("moons", 500, 0)
    settings = TINY | dict(pool_size=2**10, minibatch=64)
    pairs = [(LongRun(tmp_path/"a"), None), (DistributedRun(tmp_path/"b"), SharedPool()),
             (LongRun(tmp_path/"c"), DiskPool(tmp_path/"p")),
             (DistributedRun(tmp_path/"d"), SharedDiskPool(tmp_path/"q"))]
    models = []
    for loop, pool in pairs:
        models.append(NSGF(**settings).fit(moons, progress=False, loop=loop, pool=pool))
    for alone, shared in (models[:2], models[2:]):
        assert torch.equal(alone.losses, shared.losses)
        assert torch.equal(alone.sample(9, seed=4), sample(shared, 9, seed=4))
    states = sample(models[0], 9, seed=4, trajectory=True)
    assert torch.equal(states, models[0].sample(9, seed=4, trajectory=True))


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FlowMatching(**TINY).fit(sample_2d("moons", 500, 0), progress=False, loop=DistributedRun())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("message, lost", (
    ("Connection closed by peer [127.0.0.1]:2345", True), ("NCCL error", True),
    ("[enforce fail at gloo/transport] timed out", True), ("mat1 and mat2 cannot be", False)))
def test_errors_that_mean_a_lost_rank(message, lost, capsys):
    error = RuntimeError(message)
    if not lost:
        explain_lost_rank(error, Ranks(1, 2))
        return
    with pytest.raises(RuntimeError, match="rank 1 of 2 .*; step 7 is in c"):
        explain_lost_rank(error, Ranks(1, 2), "; step 7 is in c")
    assert "rank 1 of 2" in capsys.readouterr().err


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
