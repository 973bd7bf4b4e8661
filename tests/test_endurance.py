"""What a run survives, at small size; `nsgf bench endurance` does the same at full size."""
import random
import signal
from collections import Counter
from pathlib import Path

import endurance
import pytest

from nsgf_nb.files import read_json

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")


def all_survived(rows):
    return rows and not any(map(endurance.is_lost, rows))


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGTERM), ids=str)
def test_a_run_that_is_stopped_ends_with_the_same_bits(number):
    rows = endurance.stops(1, number, seed=3, progress=False)
    assert all_survived(rows)
    assert Counter(row["at"] for row in rows) == dict(pool=1, training=1)


@pytest.mark.slow
def test_damaged_files_are_noticed_and_repaired():
    rows = endurance.damages(5, seed=1, progress=False)
    assert all_survived(rows)
    assert len({(row["what"], row["at"]) for row in rows}) > 3


@pytest.mark.slow
def test_a_full_disk():
    rows = endurance.full_disk()
    if not rows:
        pytest.skip("no tmpfs can be mounted here")
    assert all_survived(rows)


@pytest.mark.slow
@needs_proc
def test_files_from_strangers_are_read_or_refused():
    rows = endurance.fuzz(80, seed=4)
    assert len(rows) == 80
    assert all_survived(rows)
    assert {row["outcome"] for row in rows} == {"read", "refused"}
    assert all("…" in row["said"] for row in rows if row["outcome"] == "refused")  # the file


@pytest.mark.slow
def test_overheads_are_measured():
    costs = endurance.overheads(60, .1)
    assert costs["large"]["shards_read"] >= costs["large"]["shards"] == 2
    assert costs["disk"]["shards_read"] > 0
    assert 0 < costs["checkpoint"]["UNet of MNIST"]["share_of_a_minute"] < 1


@pytest.mark.slow
def test_parts_are_written_one_by_one(tmp_path, capsys):
    "The file keeps what it has of other parts."
    path = tmp_path/"endurance.json"
    path.write_text('{"fuzz": {"found": []}}')
    assert endurance.main(["--quick", "--out", str(tmp_path), "--parts", "disk"]) == 0
    result = read_json(path)
    assert list(result) == ["fuzz", "disk"]
    assert result["disk"]["command"] == "nsgf bench endurance --parts disk --quick"
    assert all_survived(result["disk"]["found"])
    output = capsys.readouterr().out
    assert "second process (training): 1 tried, 0 lost" in output


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
