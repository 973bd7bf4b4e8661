"""Pools on disk: batches, a window that moves, shards made again, manifests from strangers."""
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from nsgf_nb.data import PairSampler
from nsgf_nb.files import read_json, write_json
from nsgf_nb.flow import FlowSettings, PoolRecipe, TrajectoryPool
from nsgf_nb.nsgf import NSGF
from nsgf_nb.runs.checkpoints import LongRun
from nsgf_nb.runs.disk_pool import DiskPool, Position, seal
from nsgf_nb.targets import sample_2d
from nsgf_nb.training import TrainConfig

MODEL = dict(width=16, depth=2, batch_size=64, train_steps=60, pool_size=2**13, pool_mb=1,
             minibatch=64, device="cpu")
PATHS = 128


class Sampler(PairSampler):
    "Two moons; it notes the keys that it is restarted with."

    def __init__(self):
        config = TrainConfig()
        super().__init__(sample_2d("moons", 2000, 0), None, config, torch.device("cpu"))
        self.keys = []

    def restart(self, *key):
        self.keys.append(key)
        super().restart(*key)


def recipe(shards=5, seed=0, **flow):
    return PoolRecipe(shape=(2,), flow=FlowSettings(**{"blur": .1, **flow}), pairs=shards*PATHS,
                      minibatch=64, seed=seed)


def build(folder, shards=5, sampler=None, rank=0, ranks=1, **flow):
    pool = DiskPool(folder, paths=PATHS)
    pool.rank, pool.ranks = rank, ranks
    with torch.random.fork_rng():
        return pool.build(recipe(shards, **flow), sampler or Sampler(), progress=False)


@pytest.fixture
def pool(tmp_path):
    return build(tmp_path/"pool")


def states_of(pool, shards=5):
    return torch.cat([pool.store.read(i) for i in range(shards)], 1)


def paths_of(states, x, t, u):
    "Which paths of `states` (steps+1, N, 2) the points x with velocities u lie on."
    K = len(states) - 1
    k = (t*K).long().clamp(max=K - 1)
    move = states[k + 1] - states[k]  # (B, N, 2)
    on_path = states[k] + (t*K - k)[:, None, None]*move
    error = (on_path - x[:, None]).abs().sum(-1) + (move*K - u[:, None]).abs().sum(-1)
    assert (error.min(1).values < 1e-4).all()
    return error.argmin(1)


def draw(pool, count, size=PATHS//2, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    return [pool.batch(size, generator) for _ in range(count)]


def shards_of(states, batches):
    return torch.cat([paths_of(states, *batch) for batch in batches])//PATHS


# ---- reading

def test_batches_are_points_of_all_paths_and_nothing_moves_if_the_window_holds_all(pool):
    states = states_of(pool)
    paths = torch.cat([paths_of(states, *batch) for batch in draw(pool, 40)])
    assert len(paths.unique()) > .95*len(pool)
    assert len(pool) == 5*PATHS
    assert pool.position.first == 0 and pool.position.moves > 0


def test_a_small_window_sees_all_shards_in_time(pool):
    states = states_of(pool)
    small = DiskPool(pool.folder, window_mb=.01)
    generator = torch.Generator().manual_seed(0)
    assert len(shards_of(states, draw(small, 1, generator=generator)).unique()) == 2
    assert small.window.states.shape == (6, 2*PATHS, 2)
    assert len(shards_of(states, draw(small, 40, generator=generator)).unique()) == 5
    assert small.position.first == 20


def test_the_position_is_restored(pool):
    generator = torch.Generator().manual_seed(0)
    small = DiskPool(pool.folder, window_mb=.01)
    draw(small, 13, 50, generator)
    state = small.get_state()
    generator_state = generator.get_state()
    following = draw(small, 13, 50, generator)
    resumed = DiskPool(pool.folder, window_mb=.01)
    resumed.set_state(state)
    generator.set_state(generator_state)
    for expected, batch in zip(following, draw(resumed, 13, 50, generator)):
        assert all(torch.equal(u, v) for u, v in zip(expected, batch))


def test_a_window_may_have_another_size_when_a_run_is_resumed(pool):
    small = DiskPool(pool.folder, window_mb=.01)
    draw(small, 13)
    resumed = DiskPool(pool.folder, window_mb=100)
    resumed.set_state(small.get_state())
    assert len(shards_of(states_of(pool), draw(resumed, 40)).unique()) == 5


@pytest.mark.parametrize("state", (
    torch.zeros(2, dtype=torch.long), torch.zeros(3), torch.tensor([-1, 0, 0]),
    torch.zeros(3, 1, dtype=torch.long)), ids=str)
def test_states_that_are_none(pool, state):
    with pytest.raises(ValueError, match="state .* at least 3 integers"):
        pool.set_state(state)


@pytest.mark.parametrize("position", (
    Position(rounds=[6]), Position(rounds=[0]), Position(rounds=[2**40]),
    Position(first=6, rounds=[5])), ids=str)
def test_positions_that_the_pool_does_not_have(pool, position):
    pool.set_position(position)
    with pytest.raises(ValueError, match="position must be one in 5 shards"):
        draw(pool, 1)


def test_a_pool_can_grow_while_it_is_read(pool):
    reader = DiskPool(pool.folder, window_mb=.03)
    draw(reader, 1)
    build(pool.folder, 9)
    assert len(shards_of(states_of(pool, 9), draw(reader, 60)).unique()) == 9


def test_a_larger_pool_is_read_as_far_as_the_recipe_says(pool):
    part = build(pool.folder, 3)
    shards = shards_of(states_of(pool), draw(part, 20))
    assert shards.unique().tolist() == [0, 1, 2]
    assert len(part) == 5*PATHS


# ---- building

def test_only_what_is_missing_or_damaged_is_made(pool):
    store = pool.store
    before = {i: store.file(i).read_bytes() for i in range(5)}
    store.file(1).unlink()
    store.file(3).write_bytes(before[3][:-1] + bytes([before[3][-1] ^ 4]))
    shutil.copy(store.file(0), store.file(4))  # whole and of this pool, but another shard
    faults = store.faults(range(5))
    assert set(faults) == {1, 3, 4}
    assert "is not shard 4 of this pool" in faults[4]
    sampler = Sampler()
    with pytest.warns(UserWarning, match="shard-0000[34].*made again"):
        build(pool.folder, 6, sampler)
    assert sampler.keys == [(0, 1), (0, 3), (0, 4), (0, 5), (0, "training")]
    assert all(store.file(i).read_bytes() == before[i] for i in range(5))
    assert read_json(pool.folder/"manifest.json")["complete"]


def test_a_shard_of_another_pool_is_noticed(pool, tmp_path):
    other = build(tmp_path/"other", 1, blur=.2)
    shutil.copy(other.store.file(0), pool.store.file(0))
    assert set(pool.store.faults(range(5))) == {0}
    with pytest.raises(ValueError, match="shard-00000.safetensors is not shard 0 of this pool"):
        pool.store.read(0)


def test_a_damaged_manifest_is_written_again_from_the_shards(pool):
    file = pool.folder/"manifest.json"
    before = {i: pool.store.file(i).stat().st_mtime_ns for i in range(5)}
    file.write_text("{")
    with pytest.warns(UserWarning, match="manifest.json .*written again"):
        build(pool.folder)
    assert read_json(file)["complete"]
    assert before == {i: pool.store.file(i).stat().st_mtime_ns for i in range(5)}
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"no pool in {pool.folder}"):
        draw(DiskPool(pool.folder), 1)
    assert len(DiskPool(pool.folder)) == 0


def test_ranks_share_the_shards(tmp_path):
    for rank, indices in ((1, [1, 3]), (0, [0, 2, 4])):
        sampler = Sampler()
        build(tmp_path, 5, sampler, rank, 2)
        assert sampler.keys == [*((0, i) for i in indices), (0, "training")]
    assert read_json(tmp_path/"manifest.json")["complete"]


def test_shards_have_whole_minibatches(tmp_path):
    pool = DiskPool(tmp_path, paths=150)
    pool.build(recipe(), Sampler(), progress=False)
    assert pool.store.paths == 128
    assert len(pool) == 5*128


def test_shards_take_an_eighth_of_the_memory(tmp_path):
    settings = PoolRecipe(shape=(2,), flow=FlowSettings(blur=.1), pairs=2**13, minibatch=64,
                          memory_mb=1)
    pool = DiskPool(tmp_path).build(settings, Sampler(), progress=False)
    assert pool.store.paths == 42*64  # below 2^20/8 bytes
    assert pool.store.bytes_in_memory < 2**20/8
    draw(pool, 1)
    assert pool.window.size == 4  # all there are; eight would fit


def test_bfloat16_is_half_as_large(tmp_path, pool):
    half = DiskPool(tmp_path/"half", dtype="bfloat16", paths=PATHS)
    half.build(recipe(1), Sampler(), progress=False)
    sizes = [p.store.file(0).stat().st_size for p in (half, pool)]
    assert .5 < sizes[0]/sizes[1] < .55
    moves, rounded = (p.store.read(0).diff(dim=0) for p in (pool, half))
    assert (moves - rounded).square().mean() < 1e-5*moves.square().mean()


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=f"{tmp_path} needs .* MB for manifest.json"):
        build(tmp_path)


# ---- folders and manifests of others

def test_other_settings_are_named(pool):
    for dtype, flow, words in (("float32", dict(blur=.2), "blur=0.1, not 0.2"),
                               ("bfloat16", dict(), "dtype='float32', not 'bfloat16'")):
        other = DiskPool(pool.folder, dtype, paths=PATHS)
        with pytest.raises(ValueError, match=f"{pool.folder} is a pool of other .*{words}"):
            other.build(recipe(**flow), Sampler(), progress=False)


@pytest.mark.parametrize("arguments, words", (
    (dict(dtype="int8"), "dtype must be one of float32, bfloat16, got 'int8'"),
    (dict(window_mb=0), "window_mb must be positive, got 0"),
    (dict(paths=-1), "paths must be positive, got -1")), ids=str)
def test_bad_arguments(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        DiskPool(tmp_path, **arguments)


@pytest.mark.parametrize("change, words", (
    (dict(shards={"../../etc/passwd": "0"}), "shards must map indices to checksums"),
    (dict(shards={"7": "0"*64}), "shards must map"),
    (dict(shards={"²": ""}), "shards must map"),
    (dict(shards={"01": ""}), "shards must map"),
    (dict(shards={"0": 0}), "shards must map"),
    (dict(planned=-1), "positive integers"),
    (dict(planned=True), "positive integers"),
    (dict(format="x"), "format is 'x'"),
    (dict(settings=[]), "must be objects"),
    (dict(settings=dict(shape=[2], steps=5, paths=512, dtype=["float32"])), "dtype is"),
    (dict(settings=dict(shape=[2], steps=5, paths=512, dtype="float32")), "seed must be"),
    (dict(settings=dict(shape=[2], steps=5, paths=512, dtype="float32", seed=2**80)), "seed must"),
    (dict(shards={"0": "0"*64}), "is not the shard that the manifest lists"),
), ids=str)
def test_manifests_of_strangers(pool, change, words):
    file = pool.folder/"manifest.json"
    write_json(file, seal(dict(read_json(file), **change)))
    with pytest.raises(ValueError, match=words):
        draw(DiskPool(pool.folder), 1)


def test_a_manifest_that_was_changed_and_not_sealed(pool):
    file = pool.folder/"manifest.json"
    write_json(file, dict(read_json(file), planned=6))
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        draw(DiskPool(pool.folder), 1)


@pytest.mark.parametrize("settings", (dict(paths=2**38), dict(steps=2**38),
                                      dict(shape=[2**20, 2**20])), ids=str)
def test_sizes_are_checked_before_anything_is_allocated(pool, settings):
    file = pool.folder/"manifest.json"
    content = read_json(file)
    write_json(file, seal(dict(content, settings=dict(content["settings"], **settings))))
    with pytest.raises(ValueError, match="more than 16 GB"):
        draw(DiskPool(pool.folder), 1)


def test_an_empty_pool(pool):
    file = pool.folder/"manifest.json"
    write_json(file, seal(dict(read_json(file), shards={})))
    with pytest.raises(ValueError, match=f"pool in {pool.folder} is empty"):
        draw(DiskPool(pool.folder), 1)


# ---- training from one

def fit(folder, data, **settings):
    return NSGF(**MODEL | settings).fit(data, progress=False, pool=DiskPool(folder))


def test_a_model_learns_the_same_whoever_made_the_pool(tmp_path):
    data = sample_2d("moons", 2000, 0)
    first = fit(tmp_path, data)
    for i in (0, 2):
        (tmp_path/f"shard-{i:05d}.safetensors").unlink()
    second = fit(tmp_path, data)
    for u, v in zip(first.net.state_dict().values(), second.net.state_dict().values()):
        assert torch.equal(u, v)


@pytest.mark.slow
def test_the_loss_is_that_of_a_pool_in_memory(tmp_path):
    data = sample_2d("moons", 2000, 0)
    memory = NSGF(**MODEL | dict(train_steps=400)).fit(data, progress=False)
    disk = fit(tmp_path, data, train_steps=400)
    last = [model.losses[-100:].mean().item() for model in (memory, disk)]
    assert math.isclose(*last, rel_tol=.25)


def test_a_second_fit_with_the_same_pool_reads_it_from_the_beginning(tmp_path):
    data = sample_2d("moons", 2000, 0)
    pool = DiskPool(tmp_path, window_mb=.1)
    losses = [NSGF(**MODEL).fit(data, progress=False, pool=pool).losses for _ in range(2)]
    assert torch.equal(*losses)


def test_a_checkpoint_holds_the_position(tmp_path):
    data = sample_2d("moons", 2000, 0)

    class Small(DiskPool):
        "A window of two shards, and an interruption at the draw of number `stop_at`."
        count = 0
        stop_at = None

        def batch(self, size, generator, visited_share=.5):
            self.count += 1
            if self.count == self.stop_at:
                os.kill(os.getpid(), 2)
            return super().batch(size, generator, visited_share)

    def train(folder, stop_at=None):
        pool = Small(folder/"pool", window_mb=.1)
        pool.stop_at = stop_at
        model = NSGF(**MODEL | dict(batch_size=1024, train_steps=20))
        return model.fit(data, progress=False, pool=pool, loop=LongRun(folder/"c"))

    whole = train(tmp_path/"whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path/"half", stop_at=13)
    resumed = train(tmp_path/"half")
    assert torch.equal(resumed.losses, whole.losses)


def test_a_run_is_not_resumed_with_another_kind_of_pool(tmp_path):
    class Stopped(LongRun):
        def step(self, trainer, signals):
            super().step(trainer, signals)
            return trainer.step == 20

    data = sample_2d("moons", 2000, 0)
    memory, disk = TrajectoryPool(), DiskPool(tmp_path/"pool")
    for pool, other in ((memory, disk), (disk, memory)):
        path = tmp_path/type(pool).__name__
        NSGF(**MODEL).fit(data, progress=False, loop=Stopped(path), pool=pool)
        with pytest.raises(ValueError, match=f"{path} does not hold a whole run: .*[1]"):
            NSGF(**MODEL).fit(data, progress=False, loop=LongRun(path), pool=other)


def test_a_function_with_a_stream_makes_shards_that_depend_on_their_index_alone(tmp_path):
    class Stream:
        def __init__(self):
            generator = torch.Generator().manual_seed(9)
            self.generator = generator
            self.get_state = generator.get_state
            self.set_state = generator.set_state

        def __call__(self, n):
            return sample_2d("moons", n, self.generator)

    def shards():
        return [path.read_bytes() for path in sorted(tmp_path.glob("*.safetensors"))]

    fit(tmp_path, Stream())
    before = shards()
    assert len(before) > 2 and len(set(before)) == len(before)
    (tmp_path/"shard-00001.safetensors").unlink()
    fit(tmp_path, Stream())
    assert shards() == before


def test_a_pool_of_other_data_or_another_blur_is_refused(tmp_path):
    fit(tmp_path, sample_2d("moons", 2000, 0))
    with pytest.raises(ValueError, match="other settings, with about="):
        fit(tmp_path, sample_2d("moons", 2000, 1))
    with pytest.raises(ValueError, match="other settings, with blur="):
        fit(tmp_path, sample_2d("moons", 2000, 0), blur=.1)
