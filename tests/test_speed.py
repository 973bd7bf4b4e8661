"""The speed benchmark: it names absent libraries, and its adapters compute the same velocity."""
import argparse
import json
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nsgf_nb.bench import plans, speed_curves
from nsgf_nb.bench.plans import PlanSizes, bench_plans
from nsgf_nb.bench.speed import (
    QUICK,
    Limits,
    bench,
    growth,
    reason_to_skip,
    register,
    summarise,
)
from nsgf_nb.bench.speed_curves import (
    METHODS,
    PEERS,
    Curve,
    Method,
    Problem,
    clouds,
    measure_curve,
    peers,
    reference_velocity,
    time_at,
)
from nsgf_nb.sinkhorn import velocity


def curve_through(*points, library="POT"):
    "A curve through points (error, seconds)."
    curve = Curve(library, "method", "float32", 1)
    for error, seconds in points:
        curve.knobs.append(error)
        curve.errors.append(error)
        curve.seconds.append(seconds)
    return curve


def scripted(results):
    "A method that gives a constant velocity for each knob, or raises."
    def make(x, y, blur, max_iter):
        def solve(knob):
            if isinstance(results[knob], Exception):
                raise results[knob]
            return torch.full_like(x, results[knob])
        return solve
    return Method("POT", "scripted", make, tuple(results))


def problem(n, blur, batch=1):
    "A problem in the plane whose reference our own solver computes."
    x, y = clouds(n, 2, batch)
    reference = velocity(x.double(), y.double(), blur, tol=1e-10, max_iter=50_000)
    return Problem(x, y, blur, reference)


# ---- time at a given error

def test_time_is_interpolated_in_logarithms():
    curve = curve_through((1e-1, 1.), (1e-5, 16.))
    assert math.isclose(time_at([curve], 1e-3), 4.)
    assert math.isclose(time_at([curve], 1e-2), 2.)
    assert time_at([curve], 1e-3, interpolate=False) == 16.
    exact = curve_through((1e-2, 1.), (0., 4.))
    assert 1. < time_at([exact], 1e-3) < 4.


def test_time_at_a_measured_error():
    assert time_at([curve_through((1e-2, 1.), (1e-3, 2.), (1e-4, 9.))], 1e-3) == 2.


def test_time_is_not_extrapolated():
    curve = curve_through((1e-1, 1.), (1e-2, 2.))
    assert time_at([curve], 1e-3) is None
    assert time_at([curve], .5) == 1.
    assert time_at([]) is None


def test_only_the_lower_edge_counts():
    edge = curve_through((1e-2, 1.), (1e-4, 4.))
    beaten = curve_through((2e-2, 1.), (5e-3, 5.), (1e-3, 4.5), (1e-4, 8.))
    assert time_at([beaten, edge], 1e-3) == time_at([edge], 1e-3)
    assert time_at([curve_through((1e-2, 5.), (1e-4, 4.))], 1e-3) == 4.


def test_summary_favours_the_peers():
    points = (1e-2, 1.), (1e-4, 4.)
    curves = [curve_through(*points, library=library) for library in ("nsgf_nb", "POT")]
    summary = summarise(curves, 1e-3)
    assert summary["seconds"]["nsgf_nb"] == 4.
    assert math.isclose(summary["seconds"]["POT"], 2.)
    assert summary["fastest_peer"] == "POT"
    assert math.isclose(summary["ratio"], .5)
    assert summarise(curves[:1], 1e-3)["ratio"] is None


# ---- clouds, methods, reference

@pytest.mark.parametrize("d", (2, 64, 784, 3072))
def test_clouds(d):
    x, y = clouds(16, d, 3, seed=1)
    assert x.shape == y.shape == (3, 16, d)
    assert x.dtype == y.dtype == torch.float32
    if d > 2:
        assert -1 <= y.min() and y.max() <= 1
        assert y.std() > .1
    again = clouds(16, d, 3, seed=1)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(y, clouds(16, d, 3, seed=2)[1])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label().replace(" ", "-"))
def test_every_method_gives_our_velocity(method):
    absent = peers()[1]
    if method.library in absent:
        pytest.skip(absent[method.library])
    two = problem(24, 2., batch=2)
    for chunk in (1, 2) if method.batched else (1,):
        curve = measure_curve(method, two, cap=60, chunk=chunk)
        assert curve.failed is None
        assert curve.chunk == chunk
        assert min(curve.errors) < (1e-2 if method.library == "GeomLoss" else 1e-3)
        assert all(seconds > 0 for seconds in curve.seconds)


@pytest.mark.parametrize("d, blur", ((2, .5), (2, 1.), (64, 4.)))
def test_reference_agrees_with_plain_iterations(d, blur):
    def barycentric_map(x, y):
        C = torch.cdist(x, y)**2/2/blur**2
        g = torch.zeros(2, 1, 32, dtype=torch.float64)
        for _ in range(5_000):
            f = -(g - C).logsumexp(-1, keepdim=True)
            g = -(f - C).logsumexp(-2, keepdim=True)
        return torch.softmax(g - C, -1) @ y
    x, y = (t.double() for t in clouds(32, d, 2))
    reference = reference_velocity(x.float(), y.float(), blur)
    assert reference.dtype == torch.float64
    expected = barycentric_map(x, y) - barycentric_map(x, x)
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-8)
    ours = reference_velocity(x, y, blur, tol=1e-8)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


# ---- curves

def test_a_curve_ends_when_it_is_fine_enough_or_slow():
    one = problem(24, 1.)
    fine = measure_curve(METHODS[0], one, cap=60, end=1e-3)
    assert [error < 1e-3 for error in fine.errors] == [False]*(len(fine.errors) - 1) + [True]
    assert len(measure_curve(METHODS[0], one, cap=1e-9).errors) == 1
    assert len(measure_curve(METHODS[0], one, cap=60, best=1e-9).errors) == 1


@pytest.mark.parametrize("bad, failure", (
    (math.nan, "not finite"), (math.inf, "not finite"), (ValueError("thin"), "ValueError: thin")))
def test_a_failed_setting_has_no_time(bad, failure):
    x = torch.ones(1, 4, 2)
    method = scripted({1: 1.5, 2: bad, 3: 1.})
    curve = measure_curve(method, Problem(x, x, 1., x), cap=1)
    assert curve.errors == [.5]
    assert len(curve.seconds) == len(curve.knobs) == 1
    assert curve.failed == failure
    assert summarise([curve], 1e-3)["seconds"] == {"POT": None}


def test_a_large_problem_skips_what_does_not_fit():
    large = problem(64, 1.)
    method = scripted({1: 1.})
    assert reason_to_skip(method, large, cap=1e9) is None
    assert re.search("GiB", reason_to_skip(replace(method, matrices=10**9), large, cap=60))
    assert re.search("would take", reason_to_skip(method, large, cap=1e-6))
    assert re.search("thin", reason_to_skip(scripted({1: ValueError("thin")}), large, cap=60))


# ---- growth

def test_growth_of_memory_is_that_of_the_matrices():
    size = growth(2048, 2, 1)
    assert (size["n"], size["d"], size["batch"]) == (2048, 2, 1)
    assert size["seconds"] > 0
    matrix = 4*2048**2
    assert matrix <= size["bytes"] < 10*matrix


def test_growth_reports_a_failure():
    assert "Error" in growth(0, 2, 1)["failed"]


# ---- which libraries take part

def hide(monkeypatch, *libraries):
    "As if these were not installed."
    for library in libraries:
        monkeypatch.setitem(sys.modules, PEERS[library][0], None)


@pytest.mark.parametrize("library", PEERS)
def test_an_absent_library_is_named(monkeypatch, library):
    hide(monkeypatch, library)
    installed, absent = peers()
    assert library not in installed
    assert "not installed" in absent[library] and "nsgf_nb[bench]" in absent[library]
    assert set(installed) | set(absent) == set(PEERS)


def test_a_jax_without_a_gpu_does_not_take_part_there(monkeypatch):
    jax = SimpleNamespace(default_backend=lambda: "cpu")
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, PEERS["OTT-JAX"][0], SimpleNamespace())
    monkeypatch.setattr(speed_curves, "version", lambda package: "1.2.3")
    assert peers("cpu")[0]["OTT-JAX"] == "1.2.3"
    installed, absent = peers("cuda")
    assert "OTT-JAX" not in installed and "1.2.3" in absent["OTT-JAX"]
    jax.default_backend = lambda: "gpu"
    assert "OTT-JAX" in peers("cuda")[0]


def test_bench_without_peers(monkeypatch, capsys, tmp_path):
    hide(monkeypatch, *PEERS)
    path = tmp_path/"a"/"b.json"
    patient = Limits(cap=60., budget=60.)
    tiny = replace(QUICK, singles=((24, 2, 1.),), pools=((16, 2, 1.),), large=((64, 2, 1.),),
                   single_limits=patient, pool_limits=patient, large_limits=patient,
                   growth_points=())
    result = bench(tiny, path)
    out = capsys.readouterr().out
    assert all(f"{library} is left out" in out for library in PEERS)
    assert set(result["absent"]) == set(PEERS)
    assert set(result["versions"]) == {"torch"}
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    for workload in result["workloads"]:
        assert {curve["library"].split(",")[0] for curve in workload["curves"]} == {"nsgf_nb"}
        assert workload["summary"]["best_error"]["nsgf_nb"] < tiny.target
        assert workload["summary"]["fastest_peer"] is workload["summary"]["ratio"] is None


# ---- the command

def run_command(*words):
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args(["sinkhorn", *map(str, words)])
    return args.call(args)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    run_command("--quick", "--device", "cpu", "--out", folder)
    assert [path.name for path in folder.iterdir()] == ["sinkhorn.json"]
    return json.loads((folder/"sinkhorn.json").read_text())


def test_quick_command(quick):
    assert quick["device"] == "cpu"
    assert quick["threads"] == torch.get_num_threads()
    assert quick["versions"]["torch"] == torch.__version__
    assert "commit" in quick["provenance"]
    assert set(quick["versions"]) | set(quick["absent"]) == {"torch", *PEERS}
    assert quick["seconds"] > 0
    assert [workload["group"] for workload in quick["workloads"]] == [
        group for group, *_ in QUICK.sizes()]
    for size in quick["growth"]:
        assert set(size) == {"n", "d", "batch", "seconds", "bytes"}
        assert size["bytes"] < 2**25


def test_quick_workloads(quick):
    for workload in quick["workloads"]:
        curves = [Curve(**curve) for curve in workload["curves"]]
        libraries = {curve.library for curve in curves}
        for curve in curves:
            assert len(curve.knobs) == len(curve.seconds) == len(curve.errors)
            assert curve.failed or curve.errors
            assert all(0 <= error < math.inf for error in curve.errors)
        summary = workload["summary"]
        assert set(summary["seconds"]) == set(summary["best_error"]) == libraries
        assert summary["best_error"]["nsgf_nb"] is not None
        skipped = {label.split()[0] for label in workload["skipped"]}
        assert libraries | skipped | set(quick["absent"]) >= {"nsgf_nb", *PEERS}
        assert (workload["products"] is None) == (workload["d"] < 64)


def test_quick_pool(quick):
    pool, = (workload for workload in quick["workloads"] if workload["group"] == "pool")
    assert pool["minibatches"] == 2
    assert pool["solved_by_peers"] == 1
    assert {"nsgf_nb", "nsgf_nb, cold starts"} <= set(pool["summary"]["seconds"])
    flow, = (curve for curve in pool["curves"] if curve["method"] == "particle_flow")
    assert len(flow["errors_by_step"]) == len(flow["errors"])
    assert all(len(errors) == QUICK.steps for errors in flow["errors_by_step"])


def test_command_refuses_a_folder_or_device_that_cannot_be_used(tmp_path):
    file = tmp_path/"file"
    file.touch()
    with pytest.raises(OSError, match=re.escape(str(file))):
        run_command("--quick", "--device", "cpu", "--out", file)
    with pytest.raises(ValueError, match="cuda:99"):
        run_command("--device", "cuda:99", "--out", tmp_path/"other")
    assert not (tmp_path/"other").exists()


def test_plans_are_timed_and_measured(tmp_path, monkeypatch, capsys):
    def no_images(name):
        raise FileNotFoundError("put MNIST somewhere")
    monkeypatch.setattr(plans, "load_images", no_images)
    sizes = PlanSizes(points=(60,), dimensions=(2, 5), among=50, tol=.1)
    result = bench_plans(sizes, tmp_path/"plans.json", "cpu")
    assert json.loads((tmp_path/"plans.json").read_text()) == json.loads(json.dumps(result))
    assert [(row["N"], row["D"]) for row in result["points"]] == [(60, 100)]
    assert [(row["N"], row["D"]) for row in result["dimensions"]] == [(50, 2), (50, 5)]
    assert "images" not in result and "put MNIST somewhere" in capsys.readouterr().out
    for row in result["points"] + result["dimensions"]:
        assert row["converged"] and row["seconds"] > 0 and row["fresh"] == 5*row["N"]
        assert math.isclose(row["perfect"], .2, abs_tol=.01)

    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(plans, "load_images", lambda name: images)
    sizes = PlanSizes(points=(), dimensions=(), images=30, images_rank=6, images_tol=.1)
    row, = bench_plans(sizes, device="cpu", progress=False)["images"]
    assert (row["N"], row["D"], row["tol"]) == (30, 6, .1)
