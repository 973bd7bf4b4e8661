"""What a run survives, at small size; `nsgf bench endurance` does the same at full size."""
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import endurance
import pytest

from nsgf_nb.files import read_json

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Where all tests work; they share the run that nothing disturbs."
    return tmp_path_factory.mktemp("endurance")


def all_survived(rows):
    return rows and not any(map(endurance.is_lost, rows))


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGTERM), ids=str)
def test_a_run_that_is_stopped_ends_with_the_same_bits(folder, number):
    rows = endurance.stops(1, folder, number, seed=3, progress=False)
    assert all_survived(rows)
    assert Counter(row["at"] for row in rows) == dict(pool=1, training=1)


@pytest.mark.slow
def test_damaged_files_are_noticed_and_repaired(folder):
    rows = endurance.damages(4, folder, seed=1, progress=False)
    assert all_survived(rows)
    assert len({(row["what"], row["at"]) for row in rows}) > 2


@pytest.mark.slow
def test_a_full_disk_and_a_second_process(folder):
    full = endurance.full_disk(folder)  # nothing if no tmpfs can be mounted
    assert all_survived(full + endurance.two_at_once(folder))


@pytest.mark.slow
@needs_proc
def test_files_from_strangers_are_read_or_refused(folder):
    rows = endurance.fuzz(80, folder, seed=4)
    assert len(rows) == 80
    assert all_survived(rows)
    assert {row["outcome"] for row in rows} == {"read", "refused"}
    assert all("…" in row["said"] for row in rows if row["outcome"] == "refused")  # the file


@pytest.mark.slow
def test_overheads_are_measured(tmp_path):
    costs = endurance.overheads(tmp_path, 60, .1)
    assert costs["large"]["shards_read"] >= costs["large"]["shards"] == 2
    assert costs["disk"]["shards_read"] > 0
    assert 0 < costs["checkpoint"]["UNet of MNIST"]["share_of_a_minute"] < 1


def test_parts_are_written_one_by_one(tmp_path, monkeypatch, capsys):
    "The file keeps what it has of other parts."
    row = dict(what="full", at="training", detected=True, survived=True, identical=True)
    monkeypatch.setitem(endurance.PARTS, "disk", lambda folder, quick, progress: [row])
    path = tmp_path/"endurance.json"
    path.write_text('{"fuzz": {"found": []}}')
    assert endurance.main(["--quick", "--out", str(tmp_path), "--parts", "disk"]) == 0
    result = read_json(path)
    assert list(result) == ["fuzz", "disk"]
    assert result["disk"]["command"] == "nsgf bench endurance --parts disk --quick"
    assert result["disk"]["made_with"]["device"] == "cpu"
    assert "full (training): 1 tried, 0 lost" in capsys.readouterr().out
    row["identical"] = False
    assert endurance.main(["--quick", "--out", str(tmp_path), "--parts", "disk"]) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_counts():
    stops = [dict(what="SIGKILL", at="pool", survived=True, identical=i > 0) for i in range(3)]
    overlooked = dict(what="bit", at="checkpoint", detected=False, survived=True, identical=True)
    fuzzed = [dict(what="fuzz", at="m", outcome=outcome) for outcome in ("read", "hang")]
    result = dict(stops=dict(found=[*stops, overlooked]), fuzz=dict(found=fuzzed))
    assert endurance.report(result).splitlines() == [
        "SIGKILL (pool): 3 tried, 1 lost", "bit (checkpoint): 1 tried, 1 lost",
        "fuzz (m): 2 tried, 1 lost", "all: 6 tried, 3 lost"]


def test_junk_goes_into_copies():
    rng = random.Random(0)
    content = dict(paths=2048, shards={"0": "ab"}, sizes=[1, 2])
    assert ("shards", "0") in list(endurance.places_in(content))
    changed = [endurance.with_junk(content, rng) for _ in range(20)]
    assert content == dict(paths=2048, shards={"0": "ab"}, sizes=[1, 2])
    assert sum(c != content for c in changed) > 15
    mangled = [endurance.mangled(b"0123456789", rng) for _ in range(20)]
    assert len(set(mangled)) > 10


GROW = """
import torch
from nsgf_nb.mlp import MLP
from nsgf_nb.training import Loop, Trainer

generator = torch.Generator().manual_seed(0)
pages = []

def batch():
    pages.append(int(open("/proc/self/statm").read().split()[1]))
    x, target = torch.randn(2, 128, 784, generator=generator)
    return x, torch.rand(128, generator=generator), target

Loop()(Trainer(MLP((784,), 32, 1), iter(batch, None), 600), progress=False)
print((pages[-1] - pages[100])*4/1024)
"""


@pytest.mark.slow
@needs_proc
def test_a_long_training_does_not_grow():
    "Memory that is kept from each step, however little, must not fragment the heap."
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert float(done.stdout) < 40, done.stdout + done.stderr  # MB; 170 with a list of losses
