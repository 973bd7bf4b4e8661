"""What a run survives, at small size; `nsgf bench endurance` does the same at large, and its notebook shows the counts."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nsgf_nb.endurance import damages, full_disk, fuzz, overheads, report_endurance, stops, two_at_once
from nsgf_nb.files import read_json


def all_well(rows):
    assert rows and [r for r in rows if not (r["survived"] and r["identical"] and r.get("detected", True))] == []


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGTERM), ids=str)
def test_a_run_that_is_stopped_ends_with_the_same_bits(how):
    rows = stops(2, how, seed=3, progress=False)
    all_well(rows)
    assert [sum(r["at"] == at for r in rows) for at in ("pool", "training")] == [2, 2]


def test_damaged_files_are_found_and_made_good():
    rows = damages(8, seed=1, progress=False)
    all_well(rows)
    assert len({(r["what"], r["at"]) for r in rows}) > 4


def test_a_full_disk():
    rows = full_disk()
    if not rows: pytest.skip("no tmpfs can be mounted here")
    all_well(rows)


def test_a_second_process_is_refused_and_does_no_harm(): all_well(two_at_once())


def test_files_from_strangers_are_read_or_refused():
    rows = fuzz(120, seed=4)
    assert len(rows) == 120 and [r for r in rows if r["outcome"] not in ("read", "refused")] == []
    assert {r["outcome"] for r in rows} == {"read", "refused"} and all("…" in r["said"] for r in rows if r["outcome"] == "refused")     # by name


def test_overheads_are_measured():
    found = overheads(60, .1)
    assert found["large"]["shards_read"] >= found["large"]["shards"] == 2 and found["disk"]["shards_read"] > 0
    assert 0 < found["checkpoint"]["UNet of MNIST"]["share_of_a_minute"] < 1


def test_the_counts():
    rows = [dict(what="SIGKILL", at="pool", survived=True, identical=i > 0) for i in range(3)] + [dict(what="bit", at="checkpoint", detected=False, survived=True, identical=True)]
    result = dict(stops=dict(found=rows), fuzz=dict(found=[dict(what="fuzz", at="m", outcome=o) for o in ("read", "hang")]))
    table, brief = report_endurance(result), report_endurance(result, brief=True)
    assert "| SIGKILL | pool | 3 | 2 | 1 |" in table and "| bit | checkpoint | 1 | 0 | 1 |" in table and "| fuzz | m | 2 | 1 | 1 |" in table
    assert "| kill -9 at a random moment | 3 | 2 | 1 |" in brief and "damaged, lost, or another's | 1 | 0 | 1 |" in brief and len(brief.splitlines()) == 5


def test_parts_of_the_command(tmp_path, capsys):
    "What the file has of other parts stays."
    from nsgf_nb.cli import main
    for part in ("disk", "fuzz"): assert main(["bench", "endurance", "--quick", "--out", str(tmp_path), "--parts", part]) == 0
    found = read_json(tmp_path/"endurance.json")
    assert list(found) == ["disk", "fuzz"] and len(found["fuzz"]["found"]) == 60 and "| second process | training | 1 | 1 | 0 |" in capsys.readouterr().out


def test_a_long_training_does_not_grow(tmp_path):
    "Memory that is kept from each step, however little, must not tear the heap to pieces."
    program = """
import torch
from nsgf_nb.matching import fit
from nsgf_nb.models import MLP
g, seen = torch.Generator().manual_seed(0), []
def batch():
    seen.append(int(open("/proc/self/statm").read().split()[1]))
    return torch.randn(128, 784, generator=g), torch.rand(128, generator=g), torch.randn(128, 784, generator=g)
fit(MLP((784,), 32, 1), iter(batch, None), 600, progress=False)
print((seen[-1] - seen[100])*4/1024)
"""
    if not Path("/proc/self/statm").exists(): pytest.skip("no /proc here")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert float(done.stdout) < 40, done.stdout + done.stderr                 # MB; it was 170
