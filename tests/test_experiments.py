"""Experiments in the plane on a budget of moments, and the results that the notebooks read."""
import dataclasses
import math
import re
import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import torch

from nsgf_nb.bench import experiments
from nsgf_nb.bench.experiments import (
    EXPERIMENTS,
    FEW_CALLS,
    GROUPS,
    Experiment,
    experiments_named,
    register_demo,
    report,
    run,
    run_demo,
    train_plane,
)
from nsgf_nb.bench.protocol import Protocol, measure, to_json
from nsgf_nb.files import read_json
from nsgf_nb.flow import TrajectoryPool
from nsgf_nb.flow_matching import FlowMatchingConfig
from nsgf_nb.nsgf import NSGF, NSGFConfig
from nsgf_nb.one_step import GeneratorConfig, SinkhornGenerator
from nsgf_nb.targets import TARGETS

RESULTS = Path(__file__).resolve().parent.parent/"nbs"/"results"
TWO = ("moons", "8gaussians-moons")
WRITTEN = ["model.safetensors", "model.safetensors.json", "paths.png", "result.json",
           "snapshots.png"]
CONFIG = NSGFConfig(sample_steps=4, pool_size=512, minibatch=64, blur=.3, train_steps=20,
                    batch_size=64, width=16, depth=1)
PROTOCOL = Protocol(w2_points=64, w2_draws=2, sw2_points=500, sw2_draws=(2, 1),
                    sample_steps=(4, 8), floor_pairs=2)


def files(folder):
    return sorted(path.name for path in Path(folder).glob("[!.]*"))


@pytest.fixture
def moments(monkeypatch):
    "Two experiments and the demo on a tiny budget."
    tiny = {f"2d-{target}": Experiment(target, CONFIG, PROTOCOL, adams_steps=(3,))
            for target in TWO}
    monkeypatch.setattr(experiments, "EXPERIMENTS", tiny)
    monkeypatch.setattr(experiments, "DEMO", Experiment("8gaussians", CONFIG, PROTOCOL))


def train(tmp_path, name="2d-moons", seed=0, **options):
    experiment = experiments.EXPERIMENTS[name]
    return run(name, experiment, seed, tmp_path, device="cpu", progress=False, **options)


def interrupt_after(monkeypatch, batches):
    "Ctrl-C in the training after so many batches."
    batch = TrajectoryPool.batch
    calls = []

    def wrapped(self, *args):
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return batch(self, *args)
    monkeypatch.setattr(TrajectoryPool, "batch", wrapped)


def test_names():
    assert list(experiments_named("2d")) == [f"2d-{target}" for target in TARGETS]
    assert len(experiments_named("self-term")) == 3
    assert list(experiments_named("2d-moons")) == ["2d-moons"]
    assert {name for group in GROUPS for name in experiments_named(group)} == set(EXPERIMENTS)
    reflows = [f"few-calls-reflow-{target}" for target in TARGETS]
    assert list(experiments_named("few-calls-reflow")) == reflows


@pytest.mark.filterwarnings("ignore:the samples are less diverse")
@pytest.mark.parametrize("method", FEW_CALLS)
def test_few_calls(tmp_path, method):
    experiment = EXPERIMENTS[f"few-calls-{method}-moons"]
    tiny = dict(train_steps=20, batch_size=64, width=16, depth=1)
    tiny |= {name: 512 for name in ("pool_size",) if getattr(experiment.config, name, 0)}
    steps = experiment.protocol.sample_steps
    protocol = dataclasses.replace(PROTOCOL, sample_steps=steps, sw2_draws=(2,)*len(steps))
    experiment = dataclasses.replace(
        experiment, config=dataclasses.replace(experiment.config, **tiny), protocol=protocol)
    result = run(f"few-calls-{method}-moons", experiment, 0, tmp_path, device="cpu", progress=False)
    assert list(result["measured"]) == [str(n) for n in steps]
    assert ("teacher" in result["seconds"]) == (method == "reflow")
    assert "training" in report(result)
    assert files(tmp_path/f"few-calls-{method}-moons"/"seed0") == WRITTEN


def test_a_run_is_recorded_and_can_be_repeated(moments, tmp_path):
    result = train(tmp_path, "2d-8gaussians-moons", seed=2)
    folder = tmp_path/"2d-8gaussians-moons"/"seed2"
    assert files(folder) == WRITTEN and read_json(folder/"result.json") == to_json(result)
    assert result["command"] == "nsgf train 2d-8gaussians-moons --seeds 2"
    assert result["config"] == to_json(CONFIG) | {"seed": 2}
    assert result["protocol"] == to_json(PROTOCOL) and result["target"] == "8gaussians-moons"
    assert len(result["w2_along_the_way"]) == CONFIG.sample_steps + 1
    model = NSGF.load(folder/"model.safetensors", device="cpu")
    again = measure("8gaussians-moons", model, PROTOCOL, result["floors"], seed=2)
    assert again == result["measured"]
    three = dataclasses.replace(PROTOCOL, sample_steps=(3,), sw2_draws=(2,))
    again = measure("8gaussians-moons", model, three, result["floors"], seed=2, method="adams")
    assert again == result["measured_adams"]
    assert "3 Adams  SW2" in report(result)


def test_a_pool_on_disk(moments, tmp_path):
    result = train(tmp_path/"a", pool=tmp_path/"pool")
    assert list((tmp_path/"pool"/"2d-moons"/"seed0").glob("*.safetensors"))
    again = train(tmp_path/"b", pool=tmp_path/"pool")
    assert again["measured"] == result["measured"]


def test_ctrl_c_keeps_the_weights_and_no_numbers_of_other_weights(
        moments, tmp_path, monkeypatch, capsys):
    train(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(KeyboardInterrupt, match="7 of 20"):
            train(tmp_path)
    path = tmp_path/"2d-moons"/"seed0"/"model.safetensors"
    assert str(path) in capsys.readouterr().out
    assert not (path.parent/"result.json").exists()
    assert NSGF.load(path).sample(5).isfinite().all()


def test_a_stopped_run_is_resumed_to_the_same_bits(moments, tmp_path, monkeypatch):
    whole = train(tmp_path/"whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path/"stopped")
    assert train(tmp_path/"stopped")["measured"] == whole["measured"]
    assert files(tmp_path/"stopped"/"2d-moons"/"seed0") == WRITTEN  # no checkpoint is left


def test_ctrl_c_while_measuring_keeps_the_weights(moments, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(experiments, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    folder = tmp_path/"2d-moons"/"seed0"
    assert (folder/"model.safetensors").exists() and not (folder/"result.json").exists()


def test_the_command_runs_all_of_a_group(moments, tmp_path, capsys):
    train_plane(Namespace(name="2d", seeds=[1], out=tmp_path, device="cpu", pool=None))
    out = capsys.readouterr().out
    for target in TWO:
        assert files(tmp_path/f"2d-{target}"/"seed1") == WRITTEN
        assert f"wrote {tmp_path/f'2d-{target}'/'seed1'}" in out
    assert len(re.findall(r"8 steps  SW2 .*ratio", out)) == len(TWO)


def test_the_demo_draws_before_it_learns(moments, tmp_path, monkeypatch, capsys):
    drawn = []
    fit = NSGF.fit

    def wrapped(self, *args, **options):
        drawn.extend(files(tmp_path/"demo"/"seed3"))
        return fit(self, *args, **options)
    monkeypatch.setattr(NSGF, "fit", wrapped)
    parser = ArgumentParser()
    register_demo(parser.add_subparsers())
    args = parser.parse_args(["demo", "--seed", "3", "--out", str(tmp_path)])
    args.device = "cpu"
    assert args.call is run_demo
    args.call(args)
    out = capsys.readouterr().out
    assert drawn == ["flow.png"] and out.index("flow.png") < out.index("SW2")
    assert files(tmp_path/"demo"/"seed3") == sorted([*WRITTEN, "flow.png"])


@pytest.mark.parametrize("command", (run_demo, train_plane))
@pytest.mark.parametrize("wrong, words", (
    (dict(out="file/below"), "file/below"), (dict(device="cuda:99"), "cuda:99")))
def test_what_cannot_work_is_found_before_the_work(
        moments, tmp_path, monkeypatch, command, wrong, words):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for name in ("cached_floors", "draw_flow", "NSGF"):
        monkeypatch.setattr(experiments, name, lambda *args: pytest.fail("started to work"))
    args = dict(name="2d-moons", seed=0, seeds=[0], out="runs", device=None, pool=None) | wrong
    with pytest.raises((OSError, ValueError), match=words):
        command(Namespace(**args))


def test_a_report_shows_no_error_of_a_single_value():
    one = dict(mean=.25, se=None, ratio=1.25, ratio_se=None)
    result = dict(measured={"100": {"sw2": one}}, floors={"sw2": dict(mean=.2, se=.01, n=500)})
    assert re.search(r"100 steps +SW2 0.2500 +floor 0.2000 ± 0.0100 +ratio 1.25 +\(500 points\)",
                     report(result))


SEEDS = {"2d": 3, "few-calls-generator": 5}  # of the results; all others have one


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_are_those_of_the_experiments(name):
    paths = sorted((RESULTS/name).glob("seed*/result.json"))
    kind = name.removesuffix(f"-{EXPERIMENTS[name].target}")
    assert len(paths) == SEEDS.get(kind, 1)
    for path in paths:
        result = read_json(path)
        experiment = EXPERIMENTS[name]
        assert result["experiment"] == name and result["target"] == experiment.target
        recorded = result["config"]
        if isinstance(experiment.config, NSGFConfig):  # from before these were settings
            recorded = to_json(NSGFConfig(scale="global", visited_share=.5)) | recorded
        if isinstance(experiment.config, GeneratorConfig):
            recorded = dict(within_data=False, maps=0) | recorded
        if isinstance(experiment.config, FlowMatchingConfig):
            recorded = dict(pool_seconds=0.) | recorded
        assert recorded == to_json(experiment.config) | {"seed": result["seed"]}
        assert result["protocol"] == to_json(experiment.protocol)
        assert path.parent.name == f"seed{result['seed']}"
        assert not result["provenance"]["commit"].endswith("dirty")
        for distances in result["measured"].values():
            for metric, d in distances.items():
                floor = result["floors"][metric]["mean"]
                assert math.isclose(d["mean"], statistics.mean(d["values"]), rel_tol=1e-9)
                assert math.isclose(d["ratio"], d["mean"]/floor, rel_tol=1e-9)


@pytest.mark.parametrize("kind, make, steps", (
    ("2d", NSGF, 10), ("few-calls-generator", SinkhornGenerator, 1)))
@pytest.mark.parametrize("target", TARGETS)
def test_models_of_the_results_give_their_numbers(target, kind, make, steps):
    folder = RESULTS/f"{kind}-{target}"/"seed0"
    result = read_json(folder/"result.json")
    model = make.load(folder/"model.safetensors", device="cpu")
    protocol = Protocol(w2_points=1024, w2_draws=1, sw2_points=1, sw2_draws=(1,),
                        sample_steps=(steps,))
    measured = measure(target, model, protocol, result["floors"])[str(steps)]["w2"]["values"][0]
    stored = result["measured"][str(steps)]["w2"]["values"][0]
    assert math.isclose(measured, stored, rel_tol=2e-3)  # half precision
    assert all(w.dtype == torch.float32 for w in model.net.state_dict().values())
