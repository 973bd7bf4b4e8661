"""The `nsgf` command, in process and on tiny budgets: exit codes, output, files that it leaves."""
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, rewrite

from nsgf_nb import NSGF, cli
from nsgf_nb.bench import experiments
from nsgf_nb.bench.experiments import Experiment
from nsgf_nb.bench.protocol import Protocol
from nsgf_nb.files import read_json
from nsgf_nb.flow import TrajectoryPool
from nsgf_nb.nsgf import NSGFConfig
from nsgf_nb.targets import TARGETS

root = Path(__file__).resolve().parent.parent
TINY = NSGFConfig(sample_steps=4, pool_size=512, minibatch=64, blur=.3, train_steps=20,
                  batch_size=64, width=16, depth=1)
PROTOCOL = dict(w2_draws=2, floor_pairs=2, w2_points=64, sw2_points=500)
WRITTEN = {"model.safetensors", "model.safetensors.json", "paths.png", "snapshots.png",
           "result.json"}
COMMANDS = ("demo", "train", "sample", "evaluate", "bench", "info")


def small(target, steps=(4, 8)):
    protocol = Protocol(**PROTOCOL, sample_steps=steps, sw2_draws=(2,)*len(steps))
    return Experiment(target, TINY, protocol)


def replace(monkeypatch, **names):
    "Other values for names of bench.experiments, also where the command line imported them."
    for name, value in names.items():
        for module in (experiments, cli):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def forbid(monkeypatch, *names):
    for name in names:
        replace(monkeypatch, **{name: lambda *args, **kwargs: pytest.fail("started to work")})


@pytest.fixture(autouse=True)
def tiny_budgets(monkeypatch, tmp_path):
    "Every experiment on a tiny budget, in an empty folder."
    replace(monkeypatch, EXPERIMENTS={f"2d-{target}": small(target) for target in TARGETS},
            DEMO=small("8gaussians", (4,)))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nsgf(command):
    return partial(command, ("nsgf", "\t", " "))


def wrong(result, words):
    "argparse: exit code 2, usage, and one line that says what is wrong."
    code, out, err = result
    assert code == 2 and not out and re.search(f"^nsgf.*: error: .*{words}", err[-1]), result


def files(folder):
    return {path.name for path in Path(folder).glob("[!.]*")}


@pytest.fixture
def trained(nsgf):
    assert nsgf("train", "2d-moons")[0] == 0
    return Path("runs/2d-moons/seed0/model.safetensors")


@pytest.fixture
def own_model():
    "A user's own model, far from the origin, without a result.json."
    data = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)) + 500
    NSGF(TINY, device="cpu").fit(data, progress=False).save("own/mine.safetensors")
    return Path("own/mine.safetensors")


# ---- help

def test_help_has_a_line_for_every_command(nsgf):
    code, out, err = nsgf("--help")
    assert code == 0 and not err
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s+[a-z]\w+", out, re.M)
        code, text, _ = nsgf(command, "--help")
        assert code == 0 and text.startswith(f"usage: nsgf {command}")


def test_bench_lists_its_kinds(nsgf):
    _, out, _ = nsgf("bench", "--help")
    for kind in ("sinkhorn", "2d", "ablations", "endurance"):
        assert re.search(rf"^ +{kind}\b", out, re.M)
        code, text, _ = nsgf("bench", kind, "--help")
        assert code == 0 and "--quick" in text and "--out" in text


@pytest.mark.parametrize("words", ((), ("fly",), ("train",), ("sample",), ("evaluate",), ("bench",),
                                   ("info", "more"), ("demo", "--fast")), ids=" ".join)
def test_wrong_calls(nsgf, words):
    wrong(nsgf(*words), ".+")


@pytest.mark.parametrize("n", ("0", "-1", "1.5", "many", "²"))
def test_a_number_below_one(nsgf, n):
    wrong(nsgf("sample", "m", f"-n={n}"), "-n")
    wrong(nsgf("sample", "m", f"--steps={n}"), "--steps")


def test_unknown_targets_list_the_known(nsgf):
    wrong(nsgf("train", "2d-spiral"), "2d-spiral.*" + ".*".join(f"2d-{t}" for t in TARGETS))
    for verb in ("sample", "evaluate"):
        wrong(nsgf(verb, "m", "--target", "spiral"), "spiral.*" + ".*".join(TARGETS))


# ---- what works

def test_train_then_sample(nsgf):
    code, out, err = nsgf("train", "2d-moons", "--seeds", 0, 1)
    folder = Path("runs/2d-moons/seed1")
    assert code == 0 and not err and str(folder) in out
    assert re.search(r"^   4 steps  SW2 [\d.]+ .* floor .* ratio .*\(500 points\)$", out, re.M)
    assert files("runs/2d-moons/seed0") == files(folder) == WRITTEN
    result = json.loads((folder/"result.json").read_text())
    assert result["seed"] == 1 and result["target"] == "moons"
    assert set(result["measured"]) == {"4", "8"} and len(result["w2_along_the_way"]) == 5
    assert len(result["measured"]["4"]["w2"]["values"]) == 2

    def sample(name, *words):
        code, out, err = nsgf("sample", folder/"model.safetensors", "-n", 30, "-o", name, *words)
        assert code == 0 and not err and f"wrote {name}" in out
        return np.load(name, allow_pickle=False)
    x = sample("x.npy", "--seed", 3)
    assert x.shape == (30, 2) and x.dtype == np.float32
    assert (sample("y.npy", "--seed", 3) == x).all()
    assert (sample("y.npy", "--seed", 4) != x).any()
    assert (sample("y.npy", "--seed", 3, "--steps", 2) != x).any()


def test_evaluate_repeats_what_the_training_measured(nsgf, trained):
    code, out, err = nsgf("evaluate", trained)
    assert code == 0 and not err
    measured = json.loads((trained.parent/"result.json").read_text())["measured"]
    for steps in ("4", "8"):
        for name in ("w2", "sw2"):
            mean = measured[steps][name]["mean"]
            assert re.search(rf"^ *{steps} steps  {name.upper()} +{mean:.4f} ", out, re.M)


def test_a_model_with_a_source_of_its_own(nsgf):
    nsgf("train", "2d-8gaussians-moons")
    path = Path("runs/2d-8gaussians-moons/seed0/model.safetensors")
    for seed in (3, 4):
        assert nsgf("sample", path, "-n", 30, "-o", f"{seed}.npy", "--seed", seed)[0] == 0
    assert (np.load("3.npy") != np.load("4.npy")).any()
    (path.parent/"result.json").unlink()
    fails(nsgf("sample", path, "-n", 30), "source of its own")
    words = ("-n", 30, "-o", "5.npy", "--seed", 3, "--target", "8gaussians-moons")
    assert nsgf("sample", path, *words)[0] == 0
    assert (np.load("3.npy") == np.load("5.npy")).all()


def test_train_2d_is_all_five(nsgf):
    code, _, _ = nsgf("train", "2d", "--out", "five")
    kept = {f"floors-{target}.json" for target in TARGETS}
    assert code == 0 and files("five") == {f"2d-{target}" for target in TARGETS} | kept
    for target in TARGETS:
        assert files(f"five/2d-{target}/seed0") == WRITTEN


def test_demo_draws_a_picture_first(nsgf):
    code, out, err = nsgf("demo", "--out", "there", "--seed", 1)
    folder = Path("there/demo/seed1")
    assert code == 0 and not err and files(folder) == WRITTEN | {"flow.png"}
    assert out.index("flow.png") < out.index("ratio") < out.index(f"wrote {folder}/")


def test_same_command_same_numbers(nsgf):
    for out in ("a", "b"):
        nsgf("train", "2d-8gaussians-moons", "--out", out)
    a, b = (Path(out)/"2d-8gaussians-moons"/"seed0" for out in ("a", "b"))
    one, two = (json.loads((folder/"result.json").read_text()) for folder in (a, b))
    assert one["measured"] == two["measured"] and one["loss"] == two["loss"]
    assert (a/"model.safetensors").read_bytes() == (b/"model.safetensors").read_bytes()


def test_images_from_shipped_weights(nsgf):
    assert nsgf("sample", "digits", "-n", 4, "-o", "sheet.png", "--nfe", 5)[0] == 0
    assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")
    assert nsgf("sample", "digits", "-n", 4, "-o", "x.npy")[0] == 0
    assert np.load("x.npy").shape == (4, 1, 8, 8)
    fails(nsgf("sample", "mnist", "--steps", 3), "--steps.*--nfe")
    assert nsgf("sample", "digits-one-call", "-n", 4, "-o", "one.npy")[0] == 0
    assert np.load("one.npy").shape == (4, 1, 8, 8)
    fails(nsgf("sample", "digits-one-call", "--nfe", 3), "steps must be 1")


def test_info(nsgf, monkeypatch):
    monkeypatch.setenv("NSGF_NB_DATA", "/some/where")
    code, out, err = nsgf("info")
    assert code == 0 and not err
    for text in (torch.__version__, "/some/where", str(Path("runs").resolve()), "digits"):
        assert text in out


@pytest.mark.slow
def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "nsgf_nb", "sample", "nowhere.safetensors"],
                          cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch("nsgf: .*nowhere.safetensors\n", done.stderr)


# ---- what does not

def test_evaluate_asks_for_the_target(nsgf, own_model):
    fails(nsgf("evaluate", own_model), "mine.safetensors.*--target")
    assert nsgf("sample", own_model, "-n", 50, "-o", "x.npy")[0] == 0
    assert abs(np.load("x.npy").mean() - 500) < 5


@pytest.mark.parametrize("verb", ("sample", "evaluate"))
def test_paths_without_a_model(nsgf, verb):
    Path("empty").touch()
    Path("junk").write_bytes(b"junk"*50)
    for path in ("nowhere.safetensors", ".", "empty", "junk"):
        fails(nsgf(verb, path), re.escape(path))


@pytest.mark.parametrize("verb", ("sample", "evaluate"))
def test_tampered_models(nsgf, trained, verb):
    about = json.loads((trained.parent/"model.safetensors.json").read_text())
    rewrite(trained, dict(config=dict(about["config"], width=17)))
    fails(nsgf(verb, trained), "whole NSGF")


@pytest.mark.parametrize("content", ("{", "{}", "[]", '{"target": "spiral"}'))
def test_a_result_json_of_something_else(nsgf, trained, content):
    (trained.parent/"result.json").write_text(content)
    fails(nsgf("evaluate", trained), "result.json|spiral")


@pytest.mark.parametrize("words", (("demo",), ("train", "2d-moons"), ("train", "2d")), ids=" ".join)
@pytest.mark.parametrize("below", ("file", "file/below"))
def test_folders_that_cannot_be_written(nsgf, monkeypatch, words, below):
    Path("file").touch()
    forbid(monkeypatch, "cached_floors", "run", "draw_flow")
    fails(nsgf(*words, "--out", below), f"folder {below}")


@pytest.mark.parametrize("output", ("file/x.npy", "no/folder/x.npy", "."))
def test_samples_that_cannot_be_written(nsgf, trained, output):
    Path("file").touch()
    fails(nsgf("sample", trained, "-o", output), re.escape(output))


@pytest.mark.parametrize("words", (("demo",), ("train", "2d-moons"), ("sample", "PATH"),
                                   ("evaluate", "PATH")), ids=" ".join)
def test_devices_that_do_not_exist(nsgf, trained, monkeypatch, words):
    forbid(monkeypatch, "cached_floors", "measure", "draw_flow")
    words = [trained if word == "PATH" else word for word in words]
    fails(nsgf(*words, "--device", "cuda:99"), "^nsgf: device 'cuda:99'")


def interrupt_training(monkeypatch, after):
    "Ctrl-C while batch number `after` is drawn."
    calls = []
    batch = TrajectoryPool.batch

    def wrapped(self, *args):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return batch(self, *args)
    monkeypatch.setattr(TrajectoryPool, "batch", wrapped)


def test_ctrl_c_in_training_keeps_the_weights(nsgf, monkeypatch):
    interrupt_training(monkeypatch, 7)
    result = nsgf("train", "2d-moons")
    fails(result, "interrupted.* 7 of 20", 130)
    path = Path("runs/2d-moons/seed0/model.safetensors")
    assert str(path) in result[1]
    assert NSGF.load(path).sample(x0=torch.zeros(5, 2)).isfinite().all()


def test_a_result_json_belongs_to_the_weights_beside_it(nsgf, trained, monkeypatch):
    before = trained.read_bytes()
    interrupt_training(monkeypatch, 7)
    assert nsgf("train", "2d-moons")[0] == 130
    assert trained.read_bytes() == before or not (trained.parent/"result.json").exists()


def test_floors_of_a_target_are_measured_once(nsgf, trained, monkeypatch):
    forbid(monkeypatch, "measure_floors")
    monkeypatch.setattr("nsgf_nb.bench.protocol.measure_floors", None)
    assert nsgf("train", "2d-moons", "--seeds", 1)[0] == 0
    floors = [read_json(f"runs/2d-moons/seed{seed}/result.json")["floors"] for seed in (0, 1)]
    assert floors[0] == floors[1] == read_json("runs/floors-moons.json")


@pytest.mark.parametrize("where", ("build", "measure", "cached_floors"))
def test_ctrl_c_anywhere_is_exit_code_130(nsgf, monkeypatch, where):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    if where == "build":
        monkeypatch.setattr(TrajectoryPool, where, interrupt)
    else:
        replace(monkeypatch, **{where: interrupt})
    fails(nsgf("train", "2d-moons"), "^nsgf: interrupted", 130)
    trained = Path("runs/2d-moons/seed0/model.safetensors").exists()
    assert trained == (where == "measure")


def test_a_machine_without_git(nsgf, monkeypatch):
    def absent(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory", "git")
    monkeypatch.setattr("nsgf_nb.bench.protocol.subprocess.run", absent)
    assert nsgf("train", "2d-moons")[0] == 0
    result = json.loads(Path("runs/2d-moons/seed0/result.json").read_text())
    assert result["provenance"]["commit"] is None


def test_a_diverging_training(nsgf, monkeypatch):
    batch = TrajectoryPool.batch

    def broken(self, *args):
        x, t, u = batch(self, *args)
        return x, t, u*float("nan")
    monkeypatch.setattr(TrajectoryPool, "batch", broken)
    fails(nsgf("train", "2d-moons"), "nan at step 0")


def test_endurance_needs_a_clone(nsgf, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.nsgf_nb, "__file__", str(tmp_path/"nsgf_nb"/"__init__.py"))
    fails(nsgf("bench", "endurance"), "clone.*endurance.py")
