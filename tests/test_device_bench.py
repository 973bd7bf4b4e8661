"""What a step asks of a device, counted; and `nsgf bench device` on the CPU."""
import functools

import pytest
import torch
from conftest import fails
from torch import nn

from nsgf_nb import cuda_graphs
from nsgf_nb.bench import device as bench
from nsgf_nb.bench.device import (
    RATES,
    OperationCount,
    Rates,
    bench_device,
    check_right,
    count_at,
    count_step,
    launches_of,
    make_step_trainer,
    rates_of,
    step_limits,
    time_steps,
    unet_config,
)
from nsgf_nb.files import read_json
from nsgf_nb.runs.minutes import Deadline
from nsgf_nb.training import TrainConfig

CPU = torch.device("cpu")
MLP = TrainConfig(batch_size=16, width=8, depth=1)
UNET = TrainConfig(batch_size=8, channels=8, mult=(1, 2), attention=(4,), clip=1.)


def batch(config, shape):
    x = torch.zeros(config.batch_size, *shape)
    return x, torch.zeros(len(x)), x


# ---- counting

@pytest.mark.parametrize("function, launches, numbers", (
    (lambda x: x + x, 1, 3*12),
    (lambda x: x.t().reshape(12).view(2, 6), 1, 2*12),  # reshape copies the transpose
    (lambda x: x.view(12)[2:5], 0, 0),
    (lambda x: x.add_(1.), 1, 2*12),
    (lambda x: x.exp().sum(), 2, 2*12 + 12 + 1),
    (lambda x: torch.cat([x, x]), 1, 2*12 + 24)))
def test_launches_and_bytes(function, launches, numbers):
    x = torch.ones(3, 4)
    with OperationCount() as count:
        function(x)
    assert (count.launches, count.bytes) == (launches, 4*numbers)


def test_products_of_a_step():
    "Forward, and two products backward but for the gradient in the first layer's input."
    config = TrainConfig(batch_size=16, width=32, depth=1)
    trainer = make_step_trainer(config, (2,), CPU)
    layers = [layer for layer in trainer.net.modules() if isinstance(layer, nn.Linear)]
    forward = sum(2*16*layer.in_features*layer.out_features for layer in layers)
    first = 2*16*layers[0].in_features*layers[0].out_features
    counted = count_step(trainer, batch(config, (2,)))["products"]
    assert 3*forward - first <= counted <= 3*forward


@pytest.mark.parametrize("config, shape", ((MLP, (2,)), (UNET, (1, 8, 8))))
def test_a_large_batch_from_two_small_ones(config, shape):
    counted = count_at(config, shape, 8)
    config = functools.partial(TrainConfig, **{**vars(config), "batch_size": 8})()
    direct = count_step(make_step_trainer(config, shape, CPU), batch(config, shape))
    assert counted == direct


def test_limits():
    rates = Rates(products=100., bytes=10.)
    assert step_limits(dict(launches=5, products=50, bytes=20), rates) == dict(products=.5, bytes=2)
    assert rates_of("NVIDIA H200") is RATES["H200"] and rates_of("NVIDIA H100 80GB HBM3")
    assert rates_of("CPU") is None


def test_a_graph_leaves_few_launches(monkeypatch):
    "On the CPU a recording that replays nothing shows what the host still has to launch."
    monkeypatch.setattr(cuda_graphs, "on_side_stream", lambda function, *inputs: function(*inputs))
    monkeypatch.setattr(cuda_graphs, "record",
                        lambda function, *inputs: (lambda: None, torch.zeros(())))
    launches = {}
    for variant in ("eager", "graph"):
        trainer = make_step_trainer(MLP, (2,), CPU, variant)
        for _ in range(6):
            next(trainer)
        launches[variant] = launches_of(trainer)
    assert launches["eager"] > 30
    # three inputs, learning rate, weight of the average, the loss, and the replay
    assert launches["graph"] == 7


def test_time_of_a_step():
    trainer = make_step_trainer(MLP, (2,), CPU)
    assert 1e-6 < time_steps(trainer, .05) < 5
    assert trainer.losses.isfinite().all()


def test_the_network_is_that_of_the_experiment():
    config = unet_config()
    assert (config.channels, config.mult, config.batch_size) == (64, (1, 2, 2, 2), 256)
    assert config.bf16 and not config.compile


# ---- the parts

def test_velocities_are_right():
    rows = check_right(CPU, Deadline(60), quick=True)["rows"]
    assert len(rows) == 2
    assert all(row["velocity"] < 2e-3 and row["gradient"] < 2e-3 for row in rows)
    assert check_right(CPU, Deadline(-1))["rows"] == []


@pytest.fixture
def nsgf(command):
    return functools.partial(command, ("nsgf", "\t", " "))


@pytest.mark.filterwarnings("ignore")
def test_every_part_on_the_cpu(nsgf, tmp_path):
    code, out, err = nsgf("bench", "device", "--quick", "--minutes", ".35", "--device", "cpu",
                          "--out", tmp_path)
    assert code == 0 and not err
    parts = {name: read_json(tmp_path/f"{name}.json")
             for name in ("right", "solver", "plane", "unet", "cifar10")}
    for name, part in parts.items():
        assert part["quick"] and part["provenance"]["name"] == "CPU"
        assert f"{name}: " in out
    plane, unet = parts["plane"]["result"], parts["unet"]["result"]
    assert plane["seconds_per_step"]["eager"] > 0 and plane["cpu_seconds_per_step"] > 0
    assert plane["launches"]["eager"] >= plane["count"]["launches"] > 30
    assert unet["count"]["products"] > 1e9 and "shares" not in unet
    assert parts["solver"]["result"]["workloads"]
    images = parts["cifar10"]["result"]
    assert "CIFAR" in images.get("failed", "CIFAR") or images


@pytest.mark.filterwarnings("ignore")
def test_a_part_that_fails_costs_no_other(monkeypatch, tmp_path, capsys):
    def fail(device, deadline, quick):
        raise RuntimeError("out of order")
    monkeypatch.setitem(bench.PARTS, "plane", (fail, .5))
    bench_device(CPU, Deadline(20), tmp_path, quick=True, parts=("plane", "right"))
    assert read_json(tmp_path/"plane.json")["result"] == {"failed": "RuntimeError: out of order"}
    assert read_json(tmp_path/"right.json")["result"]["rows"]
    assert "plane: failed: RuntimeError: out of order" in capsys.readouterr().out


def test_bad_minutes(nsgf):
    fails(nsgf("bench", "device", "--minutes", "0"), "--minutes must be positive, got 0")
