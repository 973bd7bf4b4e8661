"""The comparison: arithmetic of its tables, what a run writes, resuming, and the results."""
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import fails

from nsgf_nb.bench.comparison import (
    COMPARED,
    DATA,
    METHODS,
    QUICK,
    Comparison,
    TorchCFM,
    compare,
    read_results,
    report_table,
    side_by_side,
    summarise,
)
from nsgf_nb.bench.protocol import read_arrays, to_json
from nsgf_nb.flow_matching import FlowMatching
from nsgf_nb.targets import TARGETS, sample_2d

RESULTS = Path(__file__).resolve().parent.parent/"nbs"/"results"/"comparison"
TOY = replace(QUICK, train_steps=20)
FLOORS = dict(w2=dict(mean=.5, se=.1, pairs=2, n=128), sw2=dict(mean=.1, se=.01, pairs=2, n=500))


# ---- the table

def row(mean, seconds=1., version="2.14"):
    measured = {"10": dict(sw2=dict(mean=mean), w2=dict(mean=10*mean))}
    return dict(seconds=seconds, provenance=dict(torch=version), measured=measured)


def result(seed, **means):
    return dict(seed=seed, floors=FLOORS, methods={name: row(m) for name, m in means.items()})


def test_mean_and_deviation_over_the_seeds_in_units_of_the_floor():
    results = [result(0, NSGF=.1, FM=.4), result(1, NSGF=.2, FM=.5), result(2, NSGF=.3, FM=.9)]
    rows = summarise(results, 10)
    nsgf = [rows["NSGF"][key] for key in ("mean", "sd", "ratio", "ratio_sd")]
    assert nsgf == pytest.approx([.2, .1, 2, 1])
    assert rows["FM"]["seeds"] == 3
    assert rows["NSGF"]["marked"] and not rows["FM"]["marked"]
    assert summarise(results[:1], 10, "w2")["NSGF"]["ratio"] == pytest.approx(2)


@pytest.mark.parametrize("gap, marked", [(.9, True), (1.1, False)])
def test_methods_within_one_standard_deviation_are_marked(gap, marked):
    def spread(mean, sd):
        return mean - sd, mean, mean + sd

    sd = math.sqrt((.1**2 + .2**2)/2)
    pairs = zip(spread(1, .1), spread(1 + gap*sd, .2))
    rows = summarise([result(s, NSGF=nsgf, FM=fm) for s, (nsgf, fm) in enumerate(pairs)], 10)
    assert rows["NSGF"]["marked"] and rows["FM"]["marked"] == marked


def test_the_lines_of_the_table():
    results = {"moons": [result(0, NSGF=.1, FM=.10001)], "scurve": [result(0, NSGF=.2, SWF=.3)]}
    assert report_table(results, 10).splitlines()[2:] == [
        "| NSGF | **1.00** | **2.00** | 1 s |",  # one seed marks the best alone
        "| FM | 1.00 |  | 1 s |",
        "| SWF |  | 3.00 |  |"]
    assert report_table(results, 10, floors=False).splitlines()[2:] == [
        "| NSGF | **0.1000** | **0.2000** | 1 s |",
        "| FM | 0.1000 |  | 1 s |",
        "| SWF |  | 0.3000 |  |",
        "| *floor* | *0.1000* | *0.1000* |  |"]


def test_times_come_from_one_run_with_all_methods_and_equal_versions():
    seconds = ((9, 9, "2.14"), (2, 9, "2.14"), (1, 1, "2.15"), (9, 3, "2.14"))
    runs = [dict(seed=seed, methods=dict(NSGF=row(.1, nsgf), FM=row(.2, fm, version)))
            for seed, (nsgf, fm, version) in enumerate(seconds)]
    results = {"moons": runs, "scurve": [dict(seed=4, methods=dict(NSGF=row(.1, .5)))]}
    assert side_by_side(results)["seed"] == 1
    assert side_by_side(results, ("NSGF",))["seed"] == 4


def test_torchcfm_takes_part_only_if_it_is_named():
    results = {"moons": [result(0, NSGF=.2, torchcfm=.1)]}
    assert "torchcfm" not in report_table(results, 10)
    assert summarise(results["moons"], 10)["NSGF"]["marked"]
    assert not summarise(results["moons"], 10, methods=("NSGF", "torchcfm"))["NSGF"]["marked"]
    assert set(METHODS) - set(COMPARED) == {"torchcfm"}


# ---- runs

def toy(target, data="fresh", seed=3, methods=COMPARED, out=None):
    return compare(target, data, seed, TOY, methods, FLOORS, out, "cpu", progress=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "Every method at toy size, on the target with a source of its own."
    out = tmp_path_factory.mktemp("comparison")
    return out, toy("8gaussians-moons", out=out)


def test_every_method_runs_and_is_recorded(done):
    out, results = done
    assert json.loads((out/"fresh"/"8gaussians-moons"/"seed3.json").read_text()) == results
    assert list(results["methods"]) == list(COMPARED)
    assert results["command"].endswith("--targets 8gaussians-moons --data fresh --seeds 3")
    for name, recorded in results["methods"].items():
        measured = recorded["measured"]
        assert set(measured) == {"5", "10"}, name
        assert len(measured["5"]["sw2"]["values"]) == 2
        assert len(recorded["w2_along_the_way"]) == 6
        assert recorded["seconds"] > 0 and recorded["provenance"]["torch"]
        distances = [d for at_steps in measured.values() for d in at_steps.values()]
        assert all(math.isfinite(value) for d in distances for value in d["values"]), name
    stages = [results["methods"][name]["settings"]["stages"] for name in ("EPT", "SWF")]
    assert stages == [5, 5]  # of the smallest number of steps


def test_the_time_of_a_reflow_includes_its_teachers(done):
    rows = done[1]["methods"]
    for name, teacher in (("2-RF", "FM"), ("3-RF", "2-RF"), ("4-RF", "3-RF")):
        own = sum(rows[name]["phases"].values())
        assert rows[name]["seconds"] == pytest.approx(own + rows[teacher]["seconds"])


def test_a_stopped_comparison_is_resumed(done, tmp_path, monkeypatch):
    class Interrupted(FlowMatching):
        def fit(self, *args, **options):
            raise KeyboardInterrupt

    methods = ("FM", "2-RF", "3-RF")
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "3-RF", replace(METHODS["3-RF"], make=Interrupted))
        with pytest.raises(KeyboardInterrupt):
            toy("8gaussians-moons", methods=methods, out=tmp_path)
    first = read_results(tmp_path, "fresh")["8gaussians-moons"][0]["methods"]
    assert set(first) == {"FM", "2-RF"}
    with monkeypatch.context() as patch:  # what is recorded is not trained again
        patch.setitem(METHODS, "FM", replace(METHODS["FM"], make=Interrupted))
        resumed = toy("8gaussians-moons", methods=methods, out=tmp_path)["methods"]
    assert {name: resumed[name] for name in first} == first
    for name in methods:
        assert resumed[name]["measured"] == done[1]["methods"][name]["measured"]


def test_the_fixed_sample_is_all_that_a_method_sees(tmp_path, monkeypatch):
    seen = []

    class Spy(FlowMatching):
        def fit(self, data, *args, **options):
            seen.append(data)
            return super().fit(data, *args, **options)

    monkeypatch.setitem(METHODS, "FM", replace(METHODS["FM"], make=Spy))
    results = toy("moons", "fixed", 0, ("FM", "SWF"), tmp_path)
    assert torch.equal(seen[0], sample_2d("moons", TOY.fixed, 5_000_000))
    assert len(results["repeated"]["sw2"]["values"]) == 2
    paths = read_arrays(tmp_path/"fixed"/"moons"/"paths.npz")  # of seed 0
    assert {name: tuple(x.shape) for name, x in paths.items()} == {"FM": (6, 40, 2),
                                                                   "SWF": (6, 40, 2)}


def test_batches_of_torchcfm():
    pytest.importorskip("torchcfm")
    model = TorchCFM(coupling="ot", batch_size=64, minibatch=32, device="cpu")
    x, t, velocity = next(model.batches(sample_2d("moons", 500, seed=0)))
    assert x.shape == velocity.shape == (64, 2) and t.shape == (64,)
    start = x - t[:, None]*velocity  # a draw of the source
    assert abs(start.square().mean() - 1) < .5


def test_bad_input_is_named(done, tmp_path):
    with pytest.raises(ValueError, match="methods.*GAN"):
        toy("moons", methods=("GAN",), out=tmp_path)
    with pytest.raises(ValueError, match="data.*some"):
        toy("moons", "some", out=tmp_path)
    with pytest.raises(ValueError, match="target.*spiral"):
        toy("spiral", out=tmp_path)
    with pytest.raises(FileNotFoundError, match="nsgf bench 2d"):
        read_results(tmp_path, "fresh")
    for key, value in (("lr", .1), ("protocol", Comparison().protocol)):
        other = replace(TOY, **{key: value})
        with pytest.raises(ValueError, match="seed3.json.*(budget|protocol)"):
            compare("8gaussians-moons", "fresh", 3, other, floors=FLOORS, out=done[0])


def test_the_command(command, tmp_path):
    def nsgf(*words, out):
        return command("nsgf", "bench", "2d", "--targets", "moons", *words, "--out", tmp_path/out)

    code, printed, _ = nsgf("--quick", "--methods", "NSGF", "FM", out="q")
    assert code == 0 and f"wrote {tmp_path/'q'}/" in printed
    assert re.search(r"\| NSGF \| .*\d\.\d\d ± \d", printed)
    for data in DATA:
        assert {p.name for p in (tmp_path/"q"/data/"moons").glob("*.json")} == {"seed0.json",
                                                                                "seed1.json"}
    fails(nsgf("--methods", "NSGF", "--seeds", "0", out="q"), "seed0.json")  # not the quick variant

    draws = "--quick", "--data", "fresh", "--methods", "NSGF", "--seeds", "0", "--draws", "4"
    assert nsgf(*draws, out="draws")[0] == 0
    few, many = (read_results(tmp_path/out, "fresh")["moons"][0] for out in ("q", "draws"))
    first, more = (r["methods"]["NSGF"]["measured"]["5"]["sw2"]["values"] for r in (few, many))
    assert many["command"].endswith("--draws 4")
    assert len(more) == 4 and more[:2] == first
    assert "10" not in many["methods"]["NSGF"]["measured"]
    fails(nsgf(*draws, out="q"), "protocol")
    code, _, errors = command("nsgf bench 2d: error", "bench", "2d", "--draws", "0")
    assert code == 2 and "--draws" in errors[0] and "'0'" in errors[0]


# ---- the results of the full comparison

@pytest.mark.parametrize("path", sorted(RESULTS.glob("f*/*/seed*.json")),
                         ids=lambda path: str(path.relative_to(RESULTS)))
def test_results_agree_with_their_values_and_with_the_defaults(path):
    results = json.loads(path.read_text())
    data, target, name = path.relative_to(RESULTS).parts
    assert (results["data"], results["target"]) == (data, target) and target in TARGETS
    assert f"seed{results['seed']}.json" == name
    assert results["protocol"] == to_json(Comparison().protocol)
    assert results["budget"] == Comparison().budget
    for method, recorded in results["methods"].items():
        settings = Comparison().settings(METHODS[method], 10)
        config = METHODS[method].make.Config(**settings, seed=results["seed"])
        later = to_json(METHODS[method].make.Config())  # defaults of settings that came later
        later |= {name: value for name, value in dict(scale="global", visited_share=.5).items()
                  if name in later}
        recorded_config = later | results["config"] | recorded["settings"]
        unused = {"batch_size"} if method == "SWF" else set()
        assert {k: v for k, v in to_json(config).items() if k not in unused} == \
               {k: v for k, v in recorded_config.items() if k not in unused}, method
        for at_steps in recorded["measured"].values():
            for metric, d in at_steps.items():
                floor = results["floors"][metric]["mean"]
                assert d["mean"] == pytest.approx(statistics.mean(d["values"]), rel=1e-9)
                assert d["ratio"] == pytest.approx(d["mean"]/floor, rel=1e-9)


def test_the_full_comparison_is_complete():
    for data in DATA:
        results = read_results(RESULTS, data)
        assert set(results) == set(TARGETS)
        assert all(set(COMPARED) <= set(r["methods"]) for seeds in results.values() for r in seeds)
        for target in TARGETS:
            assert set(COMPARED) <= set(read_arrays(RESULTS/data/target/"paths.npz"))
