"""What a run survives, at small size; `nsgf bench endurance` does the same at large, and its notebook shows the counts."""
import signal

import pytest

from nsgf_nb.endurance import _same, damages, full_disk, fuzz, overheads, report_endurance, stops, two_at_once


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
    table = report_endurance(dict(rows=rows, fuzz=[dict(at="m", outcome="read"), dict(at="m", outcome="hang")]))
    assert "| SIGKILL | pool | 3 | 2 | 1 |" in table and "| bit | checkpoint | 1 | 0 | 1 |" in table and "| fuzzed | m | 2 | 1 | 1 |" in table
