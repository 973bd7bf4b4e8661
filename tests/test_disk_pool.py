"""Pools on disk: the same batches as from memory, a window that slides, shards that are made again, folders of others."""
import math
import os
import shutil

import pytest
import torch

from nsgf_nb import NSGF
from nsgf_nb.data import sample_2d
from nsgf_nb.disk_pool import DiskPool, _sealed, build_pool
from nsgf_nb.files import read_json, write_json

MODEL = dict(width=16, depth=2, batch_size=64, train_steps=60, pool_size=2**13, pool_mb=1, minibatch=64, device="cpu")


def make(i, n=64, calls=4):
    g = torch.Generator().manual_seed(i)
    for _ in range(calls): yield torch.randn(2, n, 2, generator=g), sample_2d("moons", 2*n, g).view(2, n, 2)


@pytest.fixture
def pool(tmp_path):
    p = DiskPool(tmp_path/"pool", (2,), paths=512)
    build_pool(p, make, 5, progress=False)
    return p


def on_path(states, x, t, u):
    "Which paths of `states` (steps+1, N, 2) the points x with velocities u lie on."
    K = len(states) - 1
    k = (t*K).long().clamp(max=K - 1)
    here = states[k] + (t*K - k)[:, None, None]*(states[k + 1] - states[k])               # (B, N, 2)
    off = (here - x[:, None]).abs().sum(-1) + ((states[k + 1] - states[k])*K - u[:, None]).abs().sum(-1)
    assert (off.min(1).values < 1e-4).all()
    return off.argmin(1)


# ---- reading

def test_batches_are_points_of_all_paths_and_nothing_moves_where_the_window_holds_all(pool):
    states, g = torch.cat([pool.states(i) for i in range(5)], 1), torch.Generator().manual_seed(0)
    seen = torch.cat([on_path(states, *pool.batch(256, g)) for _ in range(40)])
    assert pool.at == 0 and len(seen.unique()) > .95*len(pool) and len(pool) == 5*512


def test_a_small_window_sees_all_paths_in_time(pool):
    states, small, g = torch.cat([pool.states(i) for i in range(5)], 1), DiskPool(pool.folder, window_mb=.01), torch.Generator().manual_seed(0)
    first = on_path(states, *small.batch(256, g))//512
    assert small.slots.shape == (6, 1024, 2) and len(first.unique()) == 2
    seen = torch.cat([on_path(states, *small.batch(256, g)) for _ in range(40)])
    assert len((seen//512).unique()) == 5 and small.at == 20


def test_the_position_can_be_taken_up(pool):
    g, small = torch.Generator().manual_seed(0), DiskPool(pool.folder, window_mb=.01)
    for _ in range(13): small.batch(200, g)
    state, rng, go_on = small.get_state(), g.get_state(), [small.batch(200, g) for _ in range(13)]
    again = DiskPool(pool.folder, window_mb=.01)
    again.set_state(state); g.set_state(rng)
    assert all(torch.equal(u, v) for batch in go_on for u, v in zip(batch, again.batch(200, g)))


def test_it_can_grow_while_it_is_read(pool):
    reader, g = DiskPool(pool.folder, window_mb=.03), torch.Generator().manual_seed(0)
    reader.batch(64, g)
    assert reader.size == 2 or reader.size == 5
    build_pool(pool, make, 9, progress=False)
    states = torch.cat([pool.states(i) for i in range(9)], 1)
    seen = torch.cat([on_path(states, *reader.batch(256, g)) for _ in range(60)])
    assert len((seen//512).unique()) == 9


def test_a_pool_that_is_larger_than_asked_for_is_read_as_far_as_asked(pool):
    part = DiskPool(pool.folder, (2,), paths=512)
    build_pool(part, make, 3, progress=False)
    states, g = torch.cat([pool.states(i) for i in range(5)], 1), torch.Generator().manual_seed(0)
    seen = torch.cat([on_path(states, *part.batch(256, g)) for _ in range(20)])//512
    assert sorted(seen.unique().tolist()) == [0, 1, 2] and len(read_json(pool.file)["shards"]) == 5


# ---- building

def test_only_what_is_missing_or_damaged_is_made(pool):
    made, before = [], {i: pool.path(i).read_bytes() for i in range(5)}
    pool.path(1).unlink()
    pool.path(3).write_bytes(before[3][:-1] + bytes([before[3][-1] ^ 4]))
    shutil.copy(pool.path(0), pool.path(4))                             # whole, of this pool, but not this shard
    assert set(pool.faults()) == {1, 3, 4} and "is not shard 4 of this pool" in pool.faults()[4]
    build_pool(DiskPool(pool.folder), lambda i: made.append(i) or make(i), 6, progress=False)
    assert made == [1, 3, 4, 5] and all(pool.path(i).read_bytes() == before[i] for i in range(5))
    assert read_json(pool.file)["complete"]


def test_a_shard_of_another_pool_is_made_again(pool, tmp_path):
    other = DiskPool(tmp_path/"other", (2,), paths=512, blur=.2)
    build_pool(other, make, 1, progress=False)
    shutil.copy(other.path(0), pool.path(0))
    assert set(pool.faults()) == {0}
    with pytest.raises(ValueError, match="shard-00000.safetensors is not shard 0 of this pool"): pool.states(0)


def test_a_lost_manifest_is_made_anew_from_its_shards(pool):
    before = {i: pool.path(i).stat().st_mtime_ns for i in range(5)}
    pool.file.write_text("{")
    with pytest.warns(UserWarning, match="manifest.json is not a whole JSON file.*made anew"): again = DiskPool(pool.folder, (2,), paths=512)
    build_pool(again, make, 5, progress=False)
    assert read_json(pool.file)["complete"] and before == {i: pool.path(i).stat().st_mtime_ns for i in range(5)}
    pool.file.unlink()
    with pytest.raises(FileNotFoundError, match="no pool in"): DiskPool(pool.folder)


def test_ranks_share_the_shards(tmp_path):
    made = {0: [], 1: []}
    for rank in (1, 0): build_pool(DiskPool(tmp_path, (2,), paths=512), lambda i: made[rank].append(i) or make(i), 5, False, rank, 2)
    assert made == {0: [0, 2, 4], 1: [1, 3]} and read_json(tmp_path/"manifest.json")["complete"]


def test_too_few_particles(tmp_path):
    with pytest.raises(ValueError, match=r"make\(0\) must give at least 512 particles, got 128"): build_pool(DiskPool(tmp_path, (2,), paths=512), lambda i: make(i, 64, 1), 1, False)


def test_a_build_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr("nsgf_nb.long_runs.shutil.disk_usage", lambda path: type("Usage", (), dict(free=1000)))
    with pytest.raises(OSError, match="needs .* MB for manifest.json"): build_pool(DiskPool(tmp_path, (2,), paths=512), make, 1, False)


# ---- folders of others

def test_other_settings_are_refused_with_what_differs(pool):
    with pytest.raises(ValueError, match="is a pool of other settings, with blur=0.05, not 0.1; paths=512, not 100: name another"): DiskPool(pool.folder, (2,), paths=100, blur=.1)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'int8'"): DiskPool(pool.folder, (2,), dtype="int8")


@pytest.mark.parametrize("change, words", (
    (dict(shards={"../../etc/passwd": "0"}), "shards must map indices to checksums"), (dict(shards={"7": "0"*64}), "shards must map"), (dict(shards={"²": ""}), "shards must map"),
    (dict(planned=-1), "positive integers"), (dict(planned=True), "positive integers"), (dict(format="x"), "format is 'x'"), (dict(settings=[]), "must be objects"), (dict(settings=dict(shape=[2], steps=5, paths=512, dtype=["float32"])), "dtype is"),
    (dict(shards={"0": "0"*64}), "is not the shard that the manifest speaks of"),
), ids=str)
def test_manifests_of_strangers(pool, change, words):
    write_json(pool.file, _sealed(dict(read_json(pool.file), **change)))
    with pytest.raises(ValueError, match=words): DiskPool(pool.folder).batch(8, torch.Generator())


@pytest.mark.parametrize("settings", (dict(paths=2**38), dict(steps=2**38), dict(shape=[2**20, 2**20])), ids=str)
def test_sizes_are_checked_before_anything_is_allocated(pool, settings):
    m = read_json(pool.file)
    write_json(pool.file, _sealed(dict(m, settings=dict(m["settings"], **settings))))
    with pytest.raises(ValueError, match="more than 16 GB"): DiskPool(pool.folder)


def test_an_empty_pool(tmp_path):
    with pytest.raises(ValueError, match="is empty: build it first"): DiskPool(tmp_path, (2,)).batch(8, torch.Generator())


# ---- training from one

def test_a_model_learns_the_same_whoever_made_the_pool(tmp_path):
    data, nets = sample_2d("moons", 2000, 0), []
    for folder, lost in (("a", ()), ("b", (0, 2))):
        for _ in range(1 + bool(lost)):
            model = NSGF(**MODEL).fit(data, progress=False, pool=tmp_path/folder)
            for i in lost: (tmp_path/folder/f"shard-{i:05d}.safetensors").unlink(missing_ok=True)
        nets.append(model.net.state_dict())
    assert all(torch.equal(u, v) for u, v in zip(*(n.values() for n in nets)))
    memory = NSGF(**MODEL | dict(train_steps=400)).fit(data, progress=False).losses[-100:].mean()
    disk = NSGF(**MODEL | dict(train_steps=400)).fit(data, progress=False, pool=tmp_path/"a").losses[-100:].mean()
    assert math.isclose(memory, disk, rel_tol=.25)


def test_a_function_with_a_stream_makes_shards_that_depend_on_their_index_alone(tmp_path):
    def stream():
        g = torch.Generator().manual_seed(9)
        def draw(n): return sample_2d("moons", n, g)
        draw.get_state, draw.set_state = g.get_state, g.set_state
        return draw
    NSGF(**MODEL).fit(stream(), progress=False, pool=tmp_path/"p")
    before = [p.read_bytes() for p in sorted((tmp_path/"p").glob("*.safetensors"))]
    assert len(before) > 2 and len(set(before)) == len(before)
    os.remove(tmp_path/"p"/"shard-00001.safetensors")
    NSGF(**MODEL).fit(stream(), progress=False, pool=tmp_path/"p")
    assert before == [p.read_bytes() for p in sorted((tmp_path/"p").glob("*.safetensors"))]


def test_a_pool_of_other_data_or_blur_is_refused(tmp_path):
    NSGF(**MODEL).fit(sample_2d("moons", 2000, 0), progress=False, pool=tmp_path)
    with pytest.raises(ValueError, match="is a pool of other settings, with about="): NSGF(**MODEL).fit(sample_2d("moons", 2000, 1), progress=False, pool=tmp_path)
    with pytest.raises(ValueError, match="is a pool of other settings, with blur="): NSGF(**MODEL | dict(blur=.1)).fit(sample_2d("moons", 2000, 0), progress=False, pool=tmp_path)
