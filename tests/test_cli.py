"""The `nsgf` command, in process and on a budget of moments: exit codes, what it says, what it leaves."""
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

import nsgf_nb.cli as cli
import nsgf_nb.experiment as experiment
import nsgf_nb.matching as matching
from nsgf_nb import NSGF
from nsgf_nb.data import TARGETS
from nsgf_nb.experiment import Experiment
from nsgf_nb.flow import TrajectoryPool
from nsgf_nb.matching import NSGFConfig

root = Path(__file__).resolve().parent.parent
TINY = NSGFConfig(steps=4, pool_size=512, minibatch=64, blur=.3, train_steps=20, batch_size=64, width=16, depth=1)
WRITTEN = ["model.safetensors", "model.safetensors.json", "paths.png", "result.json"]
VERBS = "demo", "train", "sample", "evaluate", "bench", "info"


def small(target, **kw):
    return Experiment(target, TINY, **{**dict(w2_draws=2, sw2_draws=(2, 2), floor_pairs=2, w2_points=64, sw2_points=500, steps=(4, 8)), **kw})


def replace(monkeypatch, **names):
    "Other values for names of `experiment`, also where the command line has imported them."
    for name, value in names.items():
        for module in (experiment, cli):
            if hasattr(module, name): monkeypatch.setattr(module, name, value)


def nothing_starts(monkeypatch, *names):
    replace(monkeypatch, **{name: lambda *args: pytest.fail("started to work") for name in names})


@pytest.fixture(autouse=True)
def moments(monkeypatch, tmp_path):
    "Every experiment on a tiny budget, in an empty folder."
    replace(monkeypatch, EXPERIMENTS={f"2d-{t}": small(t) for t in TARGETS}, DEMO=small("8gaussians", steps=(4,)))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nsgf(command): return partial(command, ("nsgf", "\t", " "))


def wrong(result, words):
    "argparse: exit code 2, usage, and one line that says what is wrong."
    code, out, err = result
    assert code == 2 and not out and re.search(f"^nsgf.*: error: .*{words}", err[-1]), result


@pytest.fixture
def trained(nsgf):
    assert nsgf("train", "2d-moons")[0] == 0
    return Path("runs/2d-moons/seed0/model.safetensors")


@pytest.fixture
def mine(tmp_path):
    "A user's own model, with the default source, far from the origin, and no result.json."
    NSGF(TINY, device="cpu").fit(torch.randn(100, 2, generator=torch.Generator().manual_seed(0)) + 500, progress=False).save("own/mine.safetensors")
    return Path("own/mine.safetensors")


# ---- help

def test_help_has_a_line_for_every_verb(nsgf):
    code, out, err = nsgf("--help")
    assert code == 0 and not err
    out = " ".join(out.split())
    assert all(re.search(rf"\b{verb} [a-z]\w+[ ,]", out) for verb in VERBS)
    for verb in VERBS:
        code, out, _ = nsgf(verb, "--help")
        assert code == 0 and out.startswith(f"usage: nsgf {verb}")
        assert len([p for p in out.split("\n\n") if p.strip()]) >= 2           # usage, description, …


@pytest.mark.parametrize("words", ((), ("fly",), ("train",), ("sample",), ("evaluate",), ("info", "more"), ("demo", "--fast")), ids=" ".join)
def test_wrong_calls(nsgf, words): wrong(nsgf(*words), ".+")


@pytest.mark.parametrize("n", ("0", "-1", "1.5", "many", "²"))
def test_a_number_of_samples_below_one(nsgf, n):
    wrong(nsgf("sample", "m", f"-n={n}"), "argument -n: ")
    wrong(nsgf("sample", "m", f"--steps={n}"), "argument --steps: ")


def test_unknown_targets_list_the_known(nsgf):
    wrong(nsgf("train", "2d-spiral"), "2d-spiral.*" + ".*".join(f"2d-{t}" for t in TARGETS))
    for verb in ("sample", "evaluate"): wrong(nsgf(verb, "m", "--target", "spiral"), "spiral.*" + ".*".join(TARGETS))


# ---- what works

def test_train_sample_evaluate(nsgf, capsys):
    code, out, err = nsgf("train", "2d-moons", "--seeds", 0, 1)
    assert code == 0 and not err
    folder = Path("runs/2d-moons/seed1")
    assert f"wrote {folder}/: paths.png" in out and re.search(r"^   4 steps  SW2 [\d.]+ ± [\d.]+   floor .* ratio .*\(500 points\)$", out, re.M)
    assert re.search(r"^pool [\d.]+ s, training [\d.]+ s", out, re.M)
    for seed in (0, 1): assert sorted(p.name for p in Path(f"runs/2d-moons/seed{seed}").glob("[!.]*")) == WRITTEN
    result = json.loads((folder/"result.json").read_text())
    assert result["seed"] == 1 and result["protocol"]["target"] == "moons" and set(result["measured"]) == {"4", "8"}
    assert len(result["measured"]["4"]["w2"]["values"]) == 2 and len(result["w2_along_the_way"]) == 5
    assert (folder/"paths.png").read_bytes().startswith(b"\x89PNG")

    code, out, err = nsgf("sample", folder/"model.safetensors", "-n", 30, "-o", "x.npy", "--seed", 3)
    x = np.load("x.npy", allow_pickle=False)
    assert code == 0 and not err and x.shape == (30, 2) and x.dtype == np.float32 and "wrote x.npy: 30 samples" in out
    nsgf("sample", folder/"model.safetensors", "-n", 30, "-o", "y.npy", "--seed", 3)
    assert (np.load("y.npy") == x).all()
    for other in (("--seed", 4), ("--seed", 3, "--steps", 2)):
        nsgf("sample", folder/"model.safetensors", "-n", 30, "-o", "y.npy", *other)
        assert (np.load("y.npy") != x).any()


def test_evaluate_finds_what_the_training_found(nsgf, trained):
    code, out, err = nsgf("evaluate", trained)
    assert code == 0 and not err, err
    measured = json.loads((trained.parent/"result.json").read_text())["measured"]
    for steps in ("4", "8"):
        for name in ("w2", "sw2"):
            assert re.search(rf"^ *{steps} steps  {name.upper()} +{measured[steps][name]['mean']:.4f} ", out, re.M), out


def test_sample_of_a_model_with_a_source_of_its_own(nsgf):
    nsgf("train", "2d-8gaussians-moons")
    path = Path("runs/2d-8gaussians-moons/seed0/model.safetensors")
    for seed in (3, 4, 3): assert nsgf("sample", path, "-n", 30, "-o", f"{seed}.npy", "--seed", seed)[0] == 0
    assert (np.load("3.npy") != np.load("4.npy")).any()
    (path.parent/"result.json").unlink()
    fails(nsgf("sample", path, "-n", 30), "trained from a source of its own")
    assert nsgf("sample", path, "-n", 30, "-o", "5.npy", "--seed", 3, "--target", "8gaussians-moons")[0] == 0
    assert (np.load("3.npy") == np.load("5.npy")).all()


def test_train_2d_is_all_five(nsgf):
    code, out, _ = nsgf("train", "2d", "--out", "five")
    assert code == 0 and sorted(p.name for p in Path("five").iterdir()) == sorted(f"2d-{t}" for t in TARGETS)
    assert all(sorted(p.name for p in Path(f"five/2d-{t}/seed0").glob("[!.]*")) == WRITTEN for t in TARGETS)


def test_demo(nsgf):
    code, out, err = nsgf("demo", "--out", "there")
    assert code == 0 and not err and sorted(p.name for p in Path("there/demo/seed0").glob("[!.]*")) == WRITTEN
    assert "W2 " in out and "SW2" in out and "floor" in out and "ratio" in out and f"wrote {Path('there/demo/seed0')}/" in out


def test_demo_runs_every_seed_it_is_given(nsgf):
    code, _, _ = nsgf("demo", "--seeds", 1, 2)
    assert code == 2 or sorted(p.name for p in Path("runs/demo").iterdir()) == ["seed1", "seed2"]


def test_same_command_same_numbers(nsgf):
    for out in ("a", "b"): nsgf("train", "2d-8gaussians-moons", "--out", out)
    a, b = (json.loads(Path(f"{out}/2d-8gaussians-moons/seed0/result.json").read_text()) for out in ("a", "b"))
    assert a["measured"] == b["measured"] and a["floors"] == b["floors"] and a["loss"] == b["loss"]
    assert Path("a/2d-8gaussians-moons/seed0/model.safetensors").read_bytes() == Path("b/2d-8gaussians-moons/seed0/model.safetensors").read_bytes()


def test_info(nsgf, monkeypatch):
    monkeypatch.setenv("NSGF_NB_DATA", "/some/where")
    code, out, err = nsgf("info")
    assert code == 0 and not err and torch.__version__ in out and "/some/where" in out and str(Path("runs").resolve()) in out
    assert all(re.search(rf"^{key}\b", out, re.M) for key in ("nsgf_nb", "python", "torch", "device", "data", "weights"))


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "nsgf_nb", "sample", "nowhere.safetensors"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "nsgf: no model file at nowhere.safetensors\n" and done.stdout == ""


# ---- what does not

def test_a_users_own_model_is_sampled_and_measured_from_its_own_source(nsgf, mine, monkeypatch):
    starts, integrate = [], matching.integrate
    monkeypatch.setattr(matching, "integrate", lambda net, x, *args, **kw: starts.append(x) or integrate(net, x, *args, **kw))
    assert nsgf("sample", mine, "-n", 50)[0] == 0
    assert nsgf("sample", mine, "-n", 50, "--target", "moons")[0] == 0
    nsgf("evaluate", mine, "--target", "moons")
    assert len(starts) > 2 and max(x.abs().max().item() for x in starts) < 10        # N(0, I) in its own coordinates


def test_evaluate_wants_to_know_the_target(nsgf, mine):
    fails(nsgf("evaluate", mine), "what own/mine.safetensors was trained on is not known .*--target")


@pytest.mark.parametrize("verb", ("sample", "evaluate"))
def test_paths_without_a_model(nsgf, verb):
    fails(nsgf(verb, "nowhere.safetensors"), "no model file at nowhere.safetensors")
    fails(nsgf(verb, "."), "no model file at .")
    Path("empty").touch(); Path("junk").write_bytes(b"junk"*50)
    for path in ("empty", "junk"): fails(nsgf(verb, path), f"{path} is not a whole safetensors file")


@pytest.mark.parametrize("verb", ("sample", "evaluate"))
def test_tampered_models_are_one_sentence(nsgf, trained, verb):
    about = json.loads((trained.parent/"model.safetensors.json").read_text())
    rewrite(trained, dict(config=dict(about["config"], width=17)))
    fails(nsgf(verb, trained), "does not describe a whole NSGF")


@pytest.mark.parametrize("content", ("{", "{}", "[]", '{"protocol": {}}', '{"protocol": {"target": "spiral"}}'))
def test_a_result_json_of_someone_else(nsgf, trained, content):
    (trained.parent/"result.json").write_text(content)
    fails(nsgf("evaluate", trained), ".+")


@pytest.mark.parametrize("words", (("demo",), ("train", "2d-moons"), ("train", "2d")), ids=" ".join)
@pytest.mark.parametrize("below", ("file", "file/below"))
def test_folders_that_cannot_be_written_are_found_before_training(nsgf, monkeypatch, words, below):
    Path("file").touch()
    nothing_starts(monkeypatch, "measure_floors", "_train")
    fails(nsgf(*words, "--out", below), f"cannot write to the folder {below}")


@pytest.mark.parametrize("output", ("file/x.npy", "no/folder/x.npy", "."))
def test_samples_that_cannot_be_written(nsgf, trained, output):
    Path("file").touch()
    fails(nsgf("sample", trained, "-o", output), re.escape(output))


@pytest.mark.parametrize("words", (("demo",), ("train", "2d-moons"), ("sample", "PATH"), ("evaluate", "PATH")), ids=" ".join)
def test_devices_that_do_not_exist(nsgf, trained, monkeypatch, words):
    nothing_starts(monkeypatch, "measure_floors", "_distances")
    fails(nsgf(*(trained if w == "PATH" else w for w in words), "--device", "cuda:99"), "^nsgf: device 'cuda:99' cannot be used here: ")


def test_ctrl_c_in_training_keeps_the_weights(nsgf, monkeypatch):
    calls, batch = [], TrajectoryPool.batch
    def wrapped(self, *args):
        calls.append(1)
        if len(calls) > 7: raise KeyboardInterrupt
        return batch(self, *args)
    monkeypatch.setattr(TrajectoryPool, "batch", wrapped)
    result = nsgf("train", "2d-moons")
    fails(result, "interrupted: stopped after 7 of 20 steps", 130)
    path = Path("runs/2d-moons/seed0/model.safetensors")
    assert str(path) in result[1] and NSGF.load(path).sample(x0=torch.zeros(5, 2)).isfinite().all()


def test_ctrl_c_leaves_no_numbers_of_other_weights(nsgf, trained, monkeypatch):
    "A result.json beside a model belongs to it."
    before, calls, batch = trained.read_bytes(), [], TrajectoryPool.batch
    def wrapped(self, *args):
        calls.append(1)
        if len(calls) > 7: raise KeyboardInterrupt
        return batch(self, *args)
    monkeypatch.setattr(TrajectoryPool, "batch", wrapped)
    assert nsgf("train", "2d-moons")[0] == 130
    assert trained.read_bytes() == before or not (trained.parent/"result.json").exists()


@pytest.mark.parametrize("where", ("flows", "measure", "measure_floors"))
def test_ctrl_c_anywhere_is_exit_code_130(nsgf, monkeypatch, where):
    def interrupt(*args, **kw): raise KeyboardInterrupt
    if where == "flows": monkeypatch.setattr(TrajectoryPool, where, interrupt)
    else: replace(monkeypatch, **{where: interrupt})
    fails(nsgf("train", "2d-moons"), "^nsgf: interrupted", 130)
    path = Path("runs/2d-moons/seed0/model.safetensors")
    assert path.exists() == (where == "measure")                             # trained, though not measured


def test_a_machine_without_git(nsgf, monkeypatch):
    def absent(*args, **kw): raise FileNotFoundError(2, "No such file or directory", "git")
    monkeypatch.setattr("nsgf_nb.files.subprocess.run", absent)
    assert nsgf("train", "2d-moons")[0] == 0
    assert json.loads(Path("runs/2d-moons/seed0/result.json").read_text())["made_with"]["commit"] is None


def test_a_diverging_training_is_one_sentence(nsgf, monkeypatch):
    batch = TrajectoryPool.batch
    def broken(self, *args):
        x, t, u = batch(self, *args)
        return x, t, u*float("nan")
    monkeypatch.setattr(TrajectoryPool, "batch", broken)
    fails(nsgf("train", "2d-moons"), "the loss is nan at step 0")
