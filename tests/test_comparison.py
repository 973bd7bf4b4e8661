"""The comparison: it takes up what is there, refuses what is not its own, does its arithmetic, and the notebook shows what its JSONs say."""
import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from conftest import fails

import nsgf_nb.comparison as comparison
from nsgf_nb.comparison import COMPARED, METHODS, _QUICK, Comparison, compare, read_results, report_table, side_by_side, summarise
from nsgf_nb.data import TARGETS, sample_2d
from nsgf_nb.experiment import _kept_floors

root = Path(__file__).resolve().parent.parent
FLOORS = dict(w2=dict(mean=.5, se=.1, pairs=2, n=128), sw2=dict(mean=.1, se=.01, pairs=2, n=500))


def row(mean, seconds=1., version="2.14.1"): return dict(seconds=seconds, made_with=dict(torch=version), measured={"10": dict(sw2=dict(mean=mean), w2=dict(mean=10*mean))})


def result(seed, **means): return dict(seed=seed, floors=FLOORS, methods={name: row(m) for name, m in means.items()})


# ---- arithmetic

def test_mean_and_deviation_over_the_seeds_in_floors():
    rows = summarise([result(0, NSGF=.1, FM=.4), result(1, NSGF=.2, FM=.5), result(2, NSGF=.3, FM=.9)], 10)
    assert math.isclose(rows["NSGF"]["mean"], .2) and math.isclose(rows["NSGF"]["sd"], .1) and math.isclose(rows["NSGF"]["ratio"], 2) and math.isclose(rows["NSGF"]["ratio_sd"], 1)
    assert rows["FM"]["seeds"] == 3 and rows["NSGF"]["marked"] and not rows["FM"]["marked"]
    assert math.isclose(summarise([result(0, NSGF=.1)], 10, "w2")["NSGF"]["ratio"], 2)


@pytest.mark.parametrize("gap, marked", ((.9, True), (1.1, False)))
def test_marked_up_to_one_standard_deviation(gap, marked):
    spread = lambda m, sd: [m - sd, m, m + sd]
    sds = .1, .2                                                               # of the best and of the other
    gap *= math.sqrt((sds[0]**2 + sds[1]**2)/2)
    rows = summarise([result(s, NSGF=a, FM=b) for s, (a, b) in enumerate(zip(spread(1, sds[0]), spread(1 + gap, sds[1])))], 10)
    assert rows["NSGF"]["marked"] and rows["FM"]["marked"] == marked


def test_one_seed_marks_only_the_best_and_shows_no_deviation():
    r = {"moons": [result(0, NSGF=.1, FM=.10001)]}
    assert "| NSGF | **1.00** | 1 s |" in report_table(r, 10) and "| FM | 1.00 | 1 s |" in report_table(r, 10) and "nan" not in report_table(r, 10)


def test_in_data_units_the_last_line_is_the_floor():
    r = {"moons": [result(0, NSGF=.2)], "scurve": [result(0, NSGF=.3)]}
    table, floors = report_table(r, 10, floors=False), [rs[0]["floors"]["sw2"]["mean"] for rs in r.values()]
    assert "| NSGF | **0.2000** | **0.3000** | 1 s |" in table and table.endswith(f"\n| *floor* | *{floors[0]:.4f}* | *{floors[1]:.4f}* | |")
    assert "floor" not in report_table(r, 10)


def test_a_method_that_one_target_lacks_leaves_its_cell_empty():
    r = {"moons": [result(0, NSGF=.1)], "scurve": [result(0, NSGF=.2, SWF=.3)]}
    assert "| SWF |  | 3.00 | 1 s |" in report_table(r, 10)


def test_times_come_from_one_run_that_has_all_methods_with_the_same_versions():
    runs = [dict(seed=i, methods=dict(NSGF=row(.1, a), FM=row(.2, b, version))) for i, (a, b, version) in enumerate(((9, 9, "2.14.1"), (2, 9, "2.14.1"), (1, 1, "2.15.0"), (9, 3, "2.14.1")))]
    few = dict(seed=4, methods=dict(NSGF=row(.1, .5)))
    assert side_by_side({"moons": runs, "scurve": [few]})["seed"] == 1       # 11 s, neither the 2 s of two versions nor the one method in half a second
    assert side_by_side({"moons": runs, "scurve": [few]}, ("NSGF",))["seed"] == 4


def test_torchcfm_takes_part_only_where_it_is_named():
    r = {"moons": [result(0, NSGF=.2, torchcfm=.1)]}
    assert "torchcfm" not in report_table(r, 10) and summarise(r["moons"], 10)["NSGF"]["marked"]
    assert not summarise(r["moons"], 10, methods=("NSGF", "torchcfm"))["NSGF"]["marked"]
    assert set(METHODS) - set(COMPARED) == {"torchcfm"}


# ---- runs

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "Every method at toy size, on the target with a source of its own."
    out = tmp_path_factory.mktemp("comparison")
    return out, compare("8gaussians-moons", seed=3, c=_QUICK, floors=FLOORS, out=out, device="cpu", progress=False)


def test_every_method_runs_and_is_written_down(done):
    out, r = done
    assert json.loads((out/"fresh"/"8gaussians-moons"/"seed3.json").read_text()) == json.loads(json.dumps(r))
    assert list(r["methods"]) == list(COMPARED) and r["command"] == "nsgf bench 2d --targets 8gaussians-moons --data fresh --seeds 3"
    for name, m in r["methods"].items():
        assert set(m["measured"]) == {"5", "10"} and len(m["measured"]["5"]["sw2"]["values"]) == 2 and len(m["w2_along_the_way"]) == 6, name
        assert m["seconds"] > 0 and m["config"]["seed"] == 3 and m["made_with"]["torch"] and m["paths"] is None
        assert all(math.isfinite(v) for s in m["measured"].values() for d in s.values() for v in d["values"]), name


def test_time_of_a_reflow_includes_the_flows_before_it(done):
    m = done[1]["methods"]
    for name, before in (("2-RF", "FM"), ("3-RF", "2-RF"), ("4-RF", "3-RF")):
        assert math.isclose(m[name]["seconds"], sum(m[name]["phases"].values()) + m[before]["seconds"])


def test_what_is_there_is_not_done_again(done, monkeypatch):
    out, r = done
    monkeypatch.setattr(comparison, "_train", lambda *args: pytest.fail("trained again"))
    assert compare("8gaussians-moons", seed=3, c=_QUICK, floors=FLOORS, out=out, device="cpu", progress=False) == json.loads(json.dumps(r))


def test_a_stopped_comparison_goes_on_and_ends_alike(done, tmp_path, monkeypatch):
    train, calls = comparison._train, []
    def stops(name, *args):
        calls.append(name)
        if name == "3-RF" and calls.count(name) == 1: raise KeyboardInterrupt
        return train(name, *args)
    monkeypatch.setattr(comparison, "_train", stops)
    settings = dict(seed=3, c=_QUICK, floors=FLOORS, methods=("FM", "2-RF", "3-RF"), out=tmp_path, device="cpu", progress=False)
    with pytest.raises(KeyboardInterrupt): compare("8gaussians-moons", **settings)
    assert set(json.loads((tmp_path/"fresh"/"8gaussians-moons"/"seed3.json").read_text())["methods"]) == {"FM", "2-RF"}
    r = compare("8gaussians-moons", **settings)
    for name in ("FM", "2-RF", "3-RF"): assert r["methods"][name]["measured"] == done[1]["methods"][name]["measured"]


def test_results_of_another_protocol_are_refused(done):
    with pytest.raises(ValueError, match="seed3.json was made by another protocol"):
        compare("8gaussians-moons", seed=3, c=Comparison(train_steps=7), floors=FLOORS, out=done[0], device="cpu", progress=False)


def test_a_fixed_sample_is_all_that_is_seen(tmp_path, monkeypatch):
    seen = []
    class Spy(comparison.StraightFlow):
        def fit(self, data, *args, **kw): seen.append(data); return super().fit(data, *args, **kw)
    monkeypatch.setitem(METHODS, "FM", (Spy, {}))
    compare("moons", "fixed", 1, _QUICK, ("FM",), FLOORS, tmp_path, "cpu", False)
    assert torch.equal(seen[0], sample_2d("moons", _QUICK.fixed, 5_000_001))


@pytest.mark.parametrize("bad, words", ((dict(methods=("GAN",)), "methods must be among NSGF, .*, got 'GAN'"), (dict(data="some"), "data must be one of fresh, fixed, got 'some'"), (dict(target="spiral"), "spiral")))
def test_unknown_names_are_refused_before_work(tmp_path, bad, words):
    with pytest.raises(ValueError, match=words): compare(**dict(target="moons", c=_QUICK, out=tmp_path, progress=False) | bad)


def test_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results of nsgf bench 2d in"): read_results(tmp_path, "fresh")


def test_the_command(command, tmp_path):
    words = "bench", "2d", "--quick", "--targets", "moons", "--methods", "NSGF", "FM", "--out", tmp_path/"q"
    code, out, _ = command("nsgf", *words)
    assert code == 0 and re.search(r"\| NSGF \| .*\d\.\d\d ± \d", out) and f"wrote {tmp_path/'q'}/" in out
    assert sorted(p.name for p in (tmp_path/"q"/"fixed"/"moons").iterdir()) == ["seed0", "seed0.json", "seed1", "seed1.json"]
    fails(command("nsgf", "bench", "2d", "--targets", "moons", "--methods", "NSGF", "--seeds", "0", "--out", tmp_path/"q"), "another protocol")
    more = "bench", "2d", "--quick", "--targets", "moons", "--data", "fresh", "--methods", "NSGF", "--seeds", "0", "--draws", "4"
    assert command("nsgf", *more, "--out", tmp_path/"more")[0] == 0
    many, few = (json.loads((tmp_path/where/"fresh"/"moons"/"seed0.json").read_text()) for where in ("more", "q"))
    first, all_of_them = (r["methods"]["NSGF"]["measured"]["5"]["sw2"]["values"] for r in (few, many))
    assert many["command"].endswith("--draws 4") and len(all_of_them) == 4 and all_of_them[:2] == first and "10" not in many["methods"]["NSGF"]["measured"]
    fails(command("nsgf", *more, "--out", tmp_path/"q"), "another protocol")
    assert command("nsgf bench 2d: error", *more[:-1], "0")[::2] == (2, ["nsgf bench 2d: error: argument --draws: expected a whole number of at least 1, got '0'"])


def test_floors_of_another_protocol_are_measured_again(tmp_path):
    def floors(c): return _kept_floors(c.experiment("moons"), tmp_path, False)
    first = floors(_QUICK)
    assert floors(_QUICK) == first and first["w2"]["pairs"] == 3
    more = dataclasses.replace(_QUICK, floor_pairs=4)
    assert floors(more)["sw2"]["pairs"] == 4 and json.loads((tmp_path/"floors-moons.json").read_text())["w2"]["pairs"] == 4


# ---- what the notebook shows

def shown(path):
    "All text that the cells of a notebook show."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    return "\n".join("".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/markdown", [])) for o in outputs)


@pytest.mark.parametrize("data", [d for d in comparison.DATA if (root/"nbs"/"results"/"comparison"/d).exists()])
def test_tables_in_the_notebook_are_those_of_the_results(data):
    found, text = read_results(root/"nbs"/"results"/"comparison", data), shown(root/"nbs"/"20b_comparison.ipynb")
    for steps in (10, 100):
        for metric in ("sw2", "w2"): assert all(report_table(found, steps, metric, floors) in text for floors in ((True, False) if data == "fresh" else (True,)))
    if data == "fresh": assert report_table(found, 10) in (root/"README.md").read_text(encoding="utf-8")


def test_results_are_whole():
    folder = root/"nbs"/"results"/"comparison"
    for data in comparison.DATA:
        for path in folder.glob(f"{data}/*/seed*.json"):
            r = json.loads(path.read_text())
            assert r["target"] == path.parent.name in TARGETS and f"seed{r['seed']}" == path.stem and r["data"] == data
            assert {k: tuple(v) if isinstance(v, list) else v for k, v in r["protocol"].items()} == comparison.dataclasses.asdict(Comparison())
            for m in r["methods"].values():
                for found in m["measured"].values():
                    for name, d in found.items():
                        assert math.isclose(d["mean"], statistics.mean(d["values"]), rel_tol=1e-9) and math.isclose(d["ratio"], d["mean"]/r["floors"][name]["mean"], rel_tol=1e-9)
