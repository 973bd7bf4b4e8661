"""The speed benchmark: it runs everywhere, names who is missing, and its adapters compute the same velocity as we do."""
import json
import math
import re
import sys
import time

import pytest
import torch

import nsgf_nb.speed as speed
from nsgf_nb.cli import main
from nsgf_nb.speed import METHODS, Bench, bench, clouds, curve, growth, peers, time_at
from nsgf_nb.sinkhorn import velocity

PEERS = "GeomLoss", "POT", "OTT-JAX"
MODULES = {"GeomLoss": "geomloss", "POT": "ot.batch", "OTT-JAX": "ott.solvers.linear.sinkhorn"}
TINY = Bench(singles=((24, 2, 1.),), pools=((16, 2, 1.),), minibatches=2, peer_minibatches=1, steps=2, large=((64, 2, 1.),),
             grow_n=(16,), grow_batch=(), grow_d=(), caps=(.05, .1, 5.), budgets=(.1, .1, .1), methods=1)


def without(monkeypatch, *libraries):
    "As if these were not installed: importing them fails."
    for library in libraries: monkeypatch.setitem(sys.modules, MODULES[library], None)


def point(error, seconds): return dict(error=error, seconds=seconds)


# ---- the interpolation

def test_time_between_two_points_is_straight_in_the_logarithms():
    points = [point(1e-1, 1.), point(1e-5, 16.)]
    assert math.isclose(time_at(points, 1e-3), 4.)
    assert math.isclose(time_at(points, 1e-2), 2.)
    assert time_at(points, 1e-3, interpolate=False) == 16.
    assert time_at(points[::-1], 1e-3) == time_at(points, 1e-3)


def test_time_at_a_point_is_its_time():
    assert time_at([point(1e-2, 1.), point(1e-3, 2.), point(1e-4, 9.)], 1e-3) == 2.


def test_nothing_is_extrapolated():
    points = [point(1e-1, 1.), point(1e-2, 2.)]
    assert time_at(points, 1e-3) is None
    assert time_at(points, .5) == 1.
    assert time_at([], 1e-3) is None and time_at([dict(failed="not finite")], 1e-3) is None


def test_only_the_lower_edge_counts():
    edge = [point(1e-2, 1.), point(1e-4, 4.)]
    beaten = [point(2e-2, 1.), point(5e-3, 5.), point(1e-3, 4.5), point(1e-4, 8.)]
    assert math.isclose(time_at(edge + beaten, 1e-3), time_at(edge, 1e-3))
    assert time_at([point(1e-2, 5.), point(1e-4, 4.)], 1e-3) == 4.           # the finer one is the faster one


def test_an_exact_result_does_not_break_the_logarithm():
    assert 1. < time_at([point(1e-2, 1.), point(0., 4.)], 1e-3) < 4.


# ---- the clouds

@pytest.mark.parametrize("d", (2, 64, 784, 3072))
def test_clouds(d):
    x, y = clouds(16, d, 3, seed=1)
    assert x.shape == y.shape == (3, 16, d) and x.dtype == y.dtype == torch.float32
    assert d == 2 or (-1 <= y.min() and y.max() <= 1 and y.std() > .1)
    again = clouds(16, d, 3, seed=1)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(y, clouds(16, d, 3, seed=2)[1])


# ---- the adapters

@pytest.mark.parametrize("m", METHODS, ids=lambda m: f"{m.library}-{m.name}-{m.dtype}".replace("torch.", "").replace(" ", "_"))
def test_every_method_gives_our_velocity(m):
    if m.library in peers()[1]: pytest.skip(f"{m.library} is left out: {peers()[1][m.library]}")
    x, y = clouds(24, 2, 2)
    ref = velocity(x.double(), y.double(), 2., tol=1e-10, max_iter=50_000)
    for chunk in (1, 2) if m.batched else (1,):
        points = curve(m, x, y, 2., ref, cap=60, chunk=chunk)
        assert "failed" not in points[-1], points[-1]
        errors = [p["error"] for p in points]
        assert min(errors) < (1e-2 if m.library == "GeomLoss" else 1e-3), errors
        assert all(p["chunk"] == chunk and p["seconds"] > 0 and p["runs"] >= 1 for p in points)


@pytest.mark.parametrize("d, blur", ((2, .5), (2, 1.), (64, 2.)))
def test_the_reference_is_that_of_plain_iterations(d, blur):
    x, y = (t.double() for t in clouds(32, d, 2))
    def T(x, y):
        C, g = torch.cdist(x, y)**2/2/blur**2, torch.zeros(2, 1, 32, dtype=torch.float64)
        for _ in range(20_000):
            f = -(g - C).logsumexp(-1, keepdim=True)
            g = -(f - C).logsumexp(-2, keepdim=True)
        return torch.softmax(g - C, -1) @ y
    ref = speed._reference(x.float(), y.float(), blur)
    assert ref.dtype == torch.float64
    torch.testing.assert_close(ref, T(x, y) - T(x, x), rtol=0, atol=1e-8)
    torch.testing.assert_close(speed._reference(x, y, blur, tol=1e-8), ref, rtol=0, atol=1e-5)


def test_a_curve_ends_when_it_is_fine_enough_or_slow():
    x, y = clouds(24, 2)
    ref = velocity(x.double(), y.double(), 1., tol=1e-10, max_iter=50_000)
    m = METHODS[0]
    fine = curve(m, x, y, 1., ref, cap=60, end=1e-3)
    assert [p["error"] < 1e-3 for p in fine] == [False]*(len(fine) - 1) + [True]
    assert len(curve(m, x, y, 1., ref, cap=1e-9)) == 1


def scripted(results, knobs=(1, 2, 3)):
    "A method whose velocity at each knob is given; an exception is raised."
    def make(x, y, blur, iters):
        def solve(knob):
            if isinstance(results[knob], Exception): raise results[knob]
            return torch.full_like(x, results[knob])
        return solve
    return speed._Method("POT", "scripted", make, knobs)


def test_what_is_not_finite_or_raises_has_no_time():
    x = torch.ones(1, 4, 2)
    for bad, words in ((math.nan, "not finite"), (math.inf, "not finite"), (ValueError("too thin"), "ValueError: too thin")):
        points = curve(scripted({1: 1.5, 2: bad, 3: 1.}), x, x, 1., x, cap=1)
        assert len(points) == 2 and points[0]["error"] == .5
        assert points[1]["failed"] == words and "seconds" not in points[1] and "error" not in points[1]
        assert time_at(points, 1e-3) is None and speed._summary(points, 1e-3)["seconds"] == {"POT": None}


def test_summary_is_conservative_in_the_peers_favour():
    points = [dict(point(e, t), library=lib) for lib in ("nsgf_nb", "POT") for e, t in ((1e-2, 1.), (1e-4, 4.))]
    s = speed._summary(points, 1e-3)
    assert s["seconds"]["nsgf_nb"] == 4. and math.isclose(s["seconds"]["POT"], 2.)
    assert s["fastest_peer"] == "POT" and math.isclose(s["ratio"], .5)
    assert speed._summary(points[:2], 1e-3)["ratio"] is None


def test_a_large_problem_leaves_out_what_does_not_fit(monkeypatch):
    x, y = clouds(64, 2)
    slow = scripted({1: 1.})
    assert speed._why_not(slow, x, y, 1., cap=60) is None
    monkeypatch.setattr(speed, "_available", lambda device: 1000)
    assert re.fullmatch("needs about .* GiB", speed._why_not(slow, x, y, 1., cap=60))
    monkeypatch.undo()
    monkeypatch.setattr(speed, "_clock", lambda call, *args, **kw: (2., 1, call()))
    assert speed._why_not(slow, x, y, 1., cap=60) == "would take about 128 s at its coarsest setting"
    assert "too thin" in speed._why_not(scripted({1: ValueError("too thin")}), x, y, 1., cap=60)
    assert speed._available("cpu") > 2**20


# ---- growth

def test_growth_of_memory_is_that_of_the_matrices():
    small, large = growth(64, 2, 1), growth(1024, 2, 1)
    assert small["n"] == 64 and small["seconds"] > 0
    assert 2**20 < large["bytes"] < 2**30 and small["bytes"] < large["bytes"]


def test_growth_says_why_it_failed():
    assert "Error" in growth(0, 2, 1)["failed"]


# ---- the whole

@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder, start = tmp_path_factory.mktemp("speed"), time.perf_counter()
    code = main(["bench", "sinkhorn", "--quick", "--device", "cpu", "--out", str(folder)])
    return code, json.loads((folder/"sinkhorn.json").read_text()), time.perf_counter() - start, sorted(p.name for p in folder.iterdir())


def test_quick_command(quick):
    code, r, seconds, files = quick
    assert code == 0 and files == ["sinkhorn.json"]
    assert {"config", "device", "threads", "cores", "versions", "left_out", "made_with", "workloads", "growth", "seconds"} <= set(r)
    assert r["device"] == "cpu" and r["threads"] == torch.get_num_threads() and r["versions"]["torch"] == torch.__version__
    assert "commit" in r["made_with"] and set(r["versions"]) | set(r["left_out"]) == {"torch", *PEERS}
    assert {w["group"] for w in r["workloads"]} == {"single", "pool", "large"}
    assert 0 < r["seconds"] <= seconds


def test_quick_workloads(quick):
    r = quick[1]
    for w in r["workloads"]:
        assert {"group", "name", "n", "d", "blur", "minibatches", "solved_by_peers", "points", "left_out", "summary", "warnings"} <= set(w)
        for p in w["points"]:
            assert {"library", "method", "dtype", "chunk"} <= set(p)
            assert "failed" in p or (p["seconds"] > 0 and 0 <= p["error"] < math.inf and p["runs"] >= 1)
        s = w["summary"]
        assert set(s["seconds"]) == set(s["best_error"]) == {p["library"] for p in w["points"]} and s["seconds"]["nsgf_nb"]
        named = {p["library"] for p in w["points"]} | {o["method"].split()[0] for o in w["left_out"]} | set(r["left_out"])
        assert named >= {"nsgf_nb", *PEERS}
        ours = [p["error"] for p in w["points"] if p["library"] == "nsgf_nb"]
        assert min(ours) < 1e-3
    pool = [w for w in r["workloads"] if w["group"] == "pool"][0]
    assert pool["minibatches"] == 2 and pool["solved_by_peers"] == 1 and {"nsgf_nb", "nsgf_nb, cold starts"} <= set(pool["summary"]["seconds"])
    assert all(len(p["error_by_step"]) == r["config"]["steps"] for p in pool["points"] if p["method"] == "particle_flow")
    assert [set(p) for p in r["growth"]] == [{"n", "d", "batch", "seconds", "bytes"}]*len(r["growth"])


@pytest.mark.parametrize("missing", [(p,) for p in PEERS] + [PEERS], ids=" ".join)
def test_a_missing_peer_is_named(monkeypatch, capsys, tmp_path, missing):
    without(monkeypatch, *PEERS if len(missing) == 3 else missing)
    for library in set(PEERS) - {"POT", *missing}: without(monkeypatch, library)      # one is enough, and they are slow to compile
    r = bench(TINY, tmp_path/"a"/"b.json")
    out = capsys.readouterr().out
    for library in missing:
        assert f"{library} is left out: not installed" in out and "pip install nsgf_nb[bench]" in r["left_out"][library]
        assert library not in r["versions"] and all(p["library"] != library for w in r["workloads"] for p in w["points"])
    assert json.loads((tmp_path/"a"/"b.json").read_text()) == json.loads(json.dumps(r))
    if len(missing) == 3: assert all(w["summary"]["fastest_peer"] is w["summary"]["ratio"] is None for w in r["workloads"])


def test_a_peer_without_a_gpu_is_left_out_there():
    here, absent = peers("cuda")
    if "OTT-JAX" in peers()[1]: pytest.skip("OTT-JAX is not installed")
    import jax
    assert ("OTT-JAX" in here) == (jax.default_backend() == "gpu")
    assert "OTT-JAX" in here or "no GPU" in absent["OTT-JAX"]


def test_command_line_refuses(capsys, tmp_path):
    for words in (("bench",), ("bench", "training"), ("bench", "sinkhorn", "--fast")):
        with pytest.raises(SystemExit) as e: main(list(words))
        assert e.value.code == 2
    (tmp_path/"file").touch()
    capsys.readouterr()
    assert main(["bench", "sinkhorn", "--quick", "--out", str(tmp_path/"file")]) == 1
    assert capsys.readouterr().err == f"nsgf: cannot write to the folder {tmp_path/'file'}: File exists\n"
    assert main(["bench", "sinkhorn", "--device", "cuda:99", "--out", str(tmp_path/"other")]) == 1
    assert not (tmp_path/"other").exists()


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit): main(["--help"])
    assert re.search(r"\bbench +[a-z]", capsys.readouterr().out)
