"""Fault injection: kill -9, SIGTERM, a full disk, damaged files, files from strangers.

    python tests/endurance.py --out nbs/results/endurance   # half an hour; --quick: some minutes

A small training is disturbed, and the same call is made again. It survives if that call reaches
the end with the bits of a run that nobody disturbed. nbs/24_endurance.ipynb shows the results.
Needs a POSIX system, such as Linux; the runs themselves do not.
"""
import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from nsgf_nb.files import load_tensors, read_json, save_tensors, writable_folder, write_json
from nsgf_nb.flow import draw_from_paths
from nsgf_nb.mlp import MLP
from nsgf_nb.nsgf import NSGF
from nsgf_nb.runs.checkpoints import Checkpoint, LongRun, Terminated
from nsgf_nb.runs.disk_pool import DiskPool, Manifest, ShardStore, seal
from nsgf_nb.targets import sample_2d
from nsgf_nb.training import Loop, Trainer
from nsgf_nb.unet import UNet

# ---- the victim: a pool of 13 shards, through whose window the training goes twice

SHARDS = 13
VICTIM = dict(width=32, depth=2, batch_size=128, train_steps=400, pool_size=2**15, pool_mb=1,
              minibatch=64, device="cpu")


def fit_victim(folder, interval=.2):
    "Build the pool and train, or resume either."
    moons = sample_2d("moons", 3000, 0)
    loop = LongRun(folder/"checkpoint", interval)
    return NSGF(**VICTIM).fit(moons, progress=False, loop=loop, pool=DiskPool(folder/"pool"))


def run_victim(folder):
    "The work of the process that is stopped, and of the one that resumes."
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what was damaged is counted, not reported
    try:
        model = fit_victim(folder)
    except Terminated:
        raise SystemExit(143) from None
    try:
        model.save(folder/"model.safetensors")
    except OSError:  # the disk is full, on purpose
        raise SystemExit(1) from None


def start(folder, *args, job=run_victim):
    "Run a job in a process of its own, forked from one that has imported torch already."
    tests = str(Path(__file__).resolve().parent)
    if tests not in sys.path:  # the process imports this module by its name
        sys.path.append(tests)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nsgf_nb.nsgf", "nsgf_nb.runs.disk_pool", "nsgf_nb.unet"])
    process = context.Process(target=job, args=(folder, *args))
    process.start()
    return process


def idle(folder):
    "The work of a process that only shows that processes can be started."


def undisturbed(folder):
    "The run that others must agree with, made in `folder` once; its folder and seconds."
    whole = folder/"whole"
    if not whole.exists():
        start(folder, job=idle).join()  # the first process takes longer
        begin = time.perf_counter()
        process = start(whole)
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the undisturbed run failed, exit code {process.exitcode}")
        write_json(whole/"seconds.json", dict(seconds=time.perf_counter() - begin))
    return whole, read_json(whole/"seconds.json")["seconds"]


def phase_of(folder):
    "What a run was doing: building its pool, training, or nothing any more."
    if (folder/"model.safetensors").exists():
        return "finished"
    try:
        complete = read_json(folder/"pool"/"manifest.json")["complete"]
    except FileNotFoundError:
        complete = False
    return "training" if complete else "pool"


def same_model(folder, other):
    "Did two runs end with the same bits?"
    a = load_tensors(folder/"model.safetensors")[0]
    b = load_tensors(other/"model.safetensors")[0]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resume(folder, whole):
    "Make the same call again: does it reach the end, and with the bits of the undisturbed run?"
    process = start(folder)
    process.join(300)
    survived = process.exitcode == 0
    if process.exitcode is None:
        process.kill()
    return dict(survived=survived, identical=survived and same_model(folder, whole))


def wait_for(path, process, seconds=.002):
    "Wait until a file is there, or the process has ended."
    while not path.exists() and process.is_alive():
        time.sleep(seconds)


# ---- stops

def stops(
    count,  # of each phase
    folder,  # where to work
    number=signal.SIGKILL,  # the signal
    seed=0,  # of the moments
    progress=True,  # show a bar?
):  # a dict for each stop: what, at, survived, identical
    "Stop runs at random moments of both phases, and resume each."
    rng = random.Random(seed)
    name = signal.Signals(number).name
    missing = dict(pool=count, training=count)
    rows = []
    whole, seconds = undisturbed(folder)
    with tqdm(total=2*count, desc=name, disable=not progress) as bar:
        for _ in range(20*count):
            run = folder/"run"
            process = start(run)
            time.sleep(rng.uniform(0, 1.2*seconds if missing["training"] else .5*seconds))
            phase = stop(process, number, run)
            if missing.get(phase, 0):
                rows.append(dict(what=name, at=phase, **resume(run, whole)))
                missing[phase] -= 1
                bar.update()
            shutil.rmtree(run, ignore_errors=True)
            if not any(missing.values()):
                break
    return rows


def stop(process, number, run):
    "Send a signal, and wait for the end; the phase of the run."
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, number)
    process.join(60)
    return phase_of(run) if alive else "finished"


# ---- damage

def stop_halfway(folder):
    "A run that was stopped in the middle of its training, with two checkpoints."
    process = start(folder)
    wait_for(folder/"checkpoint.before", process, .01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()


def damage(path, kind, rng):
    "Flip a bit, cut the end off, empty the file, or delete it."
    content = bytearray(path.read_bytes())
    if kind == "bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)):]
    elif kind == "empty":
        content.clear()
    path.write_bytes(content)
    if kind == "lost":
        path.unlink()


def content_of(path):
    "What a file says; None if it is damaged or missing."
    try:
        return read_json(path) if path.suffix == ".json" else load_tensors(path)[1]
    except (ValueError, FileNotFoundError):
        return None


def damages(
    count,  # files to damage
    folder,  # where to work
    seed=0,  # of which, where and how
    progress=True,  # show a bar?
):  # a dict for each file: what, at, detected, survived, identical
    "Damage single files of a stopped run, and resume it."
    rng = random.Random(seed)
    rows = []
    whole, _ = undisturbed(folder)
    stop_halfway(folder/"half")
    for _ in tqdm(range(count), desc="damage", disable=not progress):
        run = Path(shutil.copytree(folder/"half", folder/"run"))
        pool = run/"pool"
        shards = [pool/f"shard-{i:05d}.safetensors" for i in rng.sample(range(SHARDS), 2)]
        path = rng.choice([run/"checkpoint", pool/"manifest.json", *shards])
        kinds = ["bit", "bit", "cut", "empty", "lost"]
        if path.name != "checkpoint":  # a foreign checkpoint is an error, and stays one
            kinds.append("foreign")
        kind = rng.choice(kinds)
        before = content_of(path)
        if kind == "foreign":  # a whole file, of another kind
            shutil.copy(whole/"model.safetensors", path)
        else:
            damage(path, kind, rng)
        detected = content_of(path) != before  # a flipped bit can fall on white space
        place = path.name.split("-")[0].split(".")[0]
        rows.append(dict(what=kind, at=place, detected=detected, **resume(run, whole)))
        shutil.rmtree(run)
    shutil.rmtree(folder/"half")
    return rows


# ---- a full disk, and two at once

@contextmanager
def small_disk(folder, size):
    "A disk of `size` kB at `folder`; gives False if this process may not mount one."
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def error_of_fit(folder):
    "The message of a call that cannot work."
    try:
        fit_victim(folder, interval=.05)
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


def fill_disk(path):
    "Write a file until the disk is full."
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass  # full, as intended


def full_disk(
    folder,  # where to work
):  # two dicts: what, at, detected, survived, identical; none if no tmpfs can be mounted
    "A disk that is too small from the beginning, and one that fills up during the training."
    whole, _ = undisturbed(folder)
    with small_disk(folder/"disk", 4500) as mounted:
        if not mounted:
            return []
        run = folder/"disk"/"run"
        ballast = folder/"disk"/"ballast"
        ballast.write_bytes(bytes(3*2**20))
        noticed_before = "left" in error_of_fit(run)
        ballast.unlink()
        process = start(run)
        wait_for(run/"checkpoint", process)
        fill_disk(ballast)
        process.join()
        noticed_later = process.exitcode != 0  # the model could not be saved
        ballast.unlink()
        result = resume(run, whole)
        return [dict(what="full", at="beginning", detected=noticed_before, **result),
                dict(what="full", at="training", detected=noticed_later, **result)]


def two_at_once(
    folder,  # where to work
):  # one dict: what, at, detected, survived, identical
    "A second process in the same folder."
    whole, _ = undisturbed(folder)
    run = folder/"run"
    process = start(run)
    wait_for(run/"checkpoint", process)
    message = error_of_fit(run)
    process.join()
    survived = process.exitcode == 0
    identical = survived and same_model(run, whole)
    shutil.rmtree(run)
    return [dict(what="second process", at="training", survived=survived, identical=identical,
                 detected="in use by another process" in message)]


# ---- files from strangers

JUNK = (None, -1, 0, 1, 2**31, 2**63, 2**80, 1e308, -.5, True, "", "../../../etc/passwd",
        "/dev/zero", "x"*10**4, [], {}, [2**40]*4, [[[[]]]], {"a": {"b": []}}, [0]*1000, "float64",
        "shard", float("nan"))


def places_in(value, path=()):
    "All places in nested dicts and lists."
    keys = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield (*path, key)
        yield from places_in(value[key], (*path, key))


def with_junk(value, rng):
    "A copy with junk in one or a few places, or without an entry."
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = list(places_in(value))
        if not places:
            break
        *way, last = rng.choice(places)
        inner = value
        for key in way:
            inner = inner[key]
        if rng.random() < .2:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(rng.choice(JUNK))
    return value


def mangled(content, rng):
    "Bytes with some of them changed, lost, doubled or added."
    content = bytearray(content)
    i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kind = rng.choice(("change", "lose", "double", "add", "header"))
    if kind == "change":
        for _ in range(rng.choice((1, 8, 64))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == "lose":
        del content[i:j]
    elif kind == "double":
        content[i:i] = content[i:j][:4096]
    elif kind == "add":
        content[i:i] = rng.randbytes(rng.choice((1, 8, 4096)))
    else:  # the length of a safetensors header
        content[:8] = rng.choice((2**63, 2**40, 10**8, 0, 7)).to_bytes(8, "little")
    return bytes(content)


def with_other_tensors(tensors, rng):
    "Tensors with one of another shape, type or content, one missing, or one more."
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(("missing", "shape", "type", "more", "content"))
    if kind == "missing":
        del tensors[name]
    elif kind == "shape":
        shape = [rng.choice((0, 1, 3, 17)) for _ in range(rng.randrange(4))]
        tensors[name] = torch.zeros(shape, dtype=tensor.dtype)
    elif kind == "type":
        types = (torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8)
        tensors[name] = tensor.to(rng.choice(types))
    elif kind == "more":
        tensors["net.more"] = torch.zeros(3)
    else:
        numbers = (float("nan"), float("inf"), -1e38) if tensor.is_floating_point() else (1,)
        tensors[name] = torch.full_like(tensor, rng.choice(numbers))
    return tensors


def fuzz_file(path, rng):
    "Change a file, and in most cases seal it with the checksum of what it says now."
    if rng.random() < .3:
        path.write_bytes(mangled(path.read_bytes(), rng))
    elif path.suffix == ".json":
        path.write_text(json.dumps(seal(with_junk(read_json(path), rng))))
    else:
        tensors, about = load_tensors(path)
        about.pop("format")
        if rng.random() < .4:
            tensors = with_other_tensors(tensors, rng)
        else:
            about = with_junk(about, rng)
        save_tensors(path, tensors, about, readable=False)


def read_file(path, run):
    "Read a file as the package does."
    if path.name == "model.safetensors":
        NSGF.load(path, "cpu").sample(2, steps=1)
    elif path.name == "checkpoint":
        short_run(path)
    else:
        DiskPool(run/"pool", window_mb=1).batch(8, torch.Generator())


def short_run(checkpoint):
    "A run that is over after 31 steps, or resumed from its checkpoint."
    settings = VICTIM | dict(train_steps=31)
    loop = LongRun(checkpoint)
    NSGF(**settings).fit(sample_2d("moons", 3000, 0), progress=False, loop=loop)


def outcome_of_reading(path, run):
    "`read`, `refused`, or what must not happen; and the message."
    signal.alarm(10)
    try:
        read_file(path, run)
        return "read", ""
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        outcome = "refused" if str(error) else "no message"
        return outcome, f"{type(error).__name__}: {error}"[:300]
    except TimeoutError as error:
        return "hang", str(error)
    except MemoryError as error:
        return "memory", str(error)
    except Exception as error:
        outcome = "memory" if "allocate" in str(error) else "crash"
        return outcome, f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)


def read_fuzzed(folder, base, count, seed):
    "The work of a process that reads fuzzed files, and may take 1 GiB more than it has now."
    def too_long(number, frame):
        raise TimeoutError("more than ten seconds")

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_long)
    names = ("model.safetensors", "checkpoint", "pool/manifest.json")
    for name in names:  # imports, and memory that is allocated anyway
        outcome_of_reading(base/name, base)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages*resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rng = random.Random(seed)
    rows = []
    for k in range(count):
        run = Path(shutil.copytree(base, folder/str(k)))
        path = run/rng.choice((*names, "pool/shard-00000.safetensors"))
        fuzz_file(path, rng)
        outcome, message = outcome_of_reading(path, run)
        message = message.replace(str(run), "…")
        rows.append(dict(what="fuzz", at=path.name, outcome=outcome, said=message))
        shutil.rmtree(run)
        if k % 50 == 0 or k + 1 == count:
            write_json(folder/"rows.json", dict(rows=rows))


def fuzz(
    count,  # files
    folder,  # where to work
    seed=0,  # of what is in them
):  # a dict for each file: what, at, outcome, said
    "Read files from strangers in a process with little memory and time."
    base = folder/"base"
    brief = NSGF(**VICTIM | dict(train_steps=1))
    brief.fit(sample_2d("moons", 3000, 0), progress=False, pool=DiskPool(base/"pool"))
    brief.save(base/"model.safetensors")
    short_run(base/"checkpoint")
    process = start(folder, base, count, seed, job=read_fuzzed)
    process.join(60 + count)
    if process.exitcode is None:
        process.kill()
    rows = read_json(folder/"rows.json")["rows"]
    if len(rows) < count:
        message = f"exit code {process.exitcode}"
        rows.append(dict(what="fuzz", at="process", outcome="crash", said=message))
    return rows


# ---- what it costs

def checkpoint_cost(path, net, x):
    "Writing a checkpoint of a network, after a step at x (B, *shape)."
    trainer = Trainer(net, iter([(x, torch.zeros(len(x)), x)]), steps=1)
    next(trainer)
    checkpoint = Checkpoint(path)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        checkpoint.write(trainer.state_dict(), {})
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    return dict(parameters=sum(p.numel() for p in net.parameters()),
                megabytes=path.stat().st_size/2**20, seconds=seconds,
                share_of_a_minute=seconds/60)


def made_up_store(folder, shape, paths, shards):
    "A pool of random paths, since only their number matters."
    settings = dict(shape=list(shape), steps=5, paths=paths, dtype="float32", seed=0)
    store = ShardStore(Manifest.open_or_create(folder, settings))
    store.manifest.plan(shards)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, paths, *shape, generator=generator).cumsum_(0)
    for i in range(shards):
        store.write(i, states.roll(i, 1))
    return store


def disk_cost(folder, steps, rounds=5):
    "Steps per second from memory, and from disk through a window of a quarter of the pool."
    shards = 16
    store = made_up_store(folder, (2,), 2**16, shards)
    states = torch.cat([store.read(i) for i in range(shards)], 1)
    pool = DiskPool(folder, window_mb=shards/4*store.bytes_in_memory/2**20)
    generator = torch.Generator().manual_seed(0)
    draws = dict(memory=lambda: draw_from_paths(states, states.shape[1], 512, generator),
                 disk=lambda: pool.batch(512, generator))
    rates = dict(memory=[], disk=[])
    for _ in range(rounds):
        for name, draw in draws.items():
            trainer = Trainer(MLP((2,), 128, 3), iter(draw, None), steps)
            rates[name].append(steps/Loop()(trainer, progress=False).seconds)
    ratios = [disk/memory for memory, disk in zip(rates["memory"], rates["disk"])]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return dict(medians, ratio=statistics.median(ratios), shards_read=pool.position.first)


def train_from_large_pool(folder, gb):
    "The work of a process that trains once through a pool of so many GB."
    torch.set_num_threads(1)
    shape = (1, 28, 28)
    paths = 2**24//(6*math.prod(shape))  # 64 MB in each shard
    shards = math.ceil(gb*2**30/(4*6*paths*math.prod(shape)))
    begin = time.perf_counter()
    store = made_up_store(folder/"large", shape, paths, shards)
    writing = time.perf_counter() - begin
    pool = DiskPool(folder/"large")
    generator = torch.Generator().manual_seed(0)
    steps = shards*paths//128
    batches = iter(lambda: pool.batch(128, generator), None)
    trainer = Trainer(MLP(shape, 64, 2), batches, steps)
    training = Loop()(trainer, progress=False).seconds
    size = sum(store.file(i).stat().st_size for i in range(shards))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    write_json(folder/"large.json", dict(
        gigabytes=size/2**30, shards=shards, shards_read=pool.position.first + pool.window.size,
        writing=writing, training=training, steps=steps, peak_memory_gb=peak/2**20))


def overheads(
    folder,  # where to work
    steps=400,  # of each training that is timed
    gb=20.,  # size of the pool that is larger than memory
):  # "checkpoint", "disk", "large": dicts
    "What checkpoints and pools on disk cost, in time and in memory."
    path = folder/"checkpoint"
    mlp = checkpoint_cost(path, MLP((2,)), torch.zeros(8, 2))
    unet = checkpoint_cost(path, UNet((1, 28, 28), 32), torch.zeros(2, 1, 28, 28))
    disk = disk_cost(folder/"pool", steps)
    start(folder, gb, job=train_from_large_pool).join()
    large = read_json(folder/"large.json")
    return dict(checkpoint={"MLP of the plane": mlp, "UNet of MNIST": unet}, disk=disk, large=large)


# ---- all of it

def do_stops(folder, quick, progress):
    kills = stops(2 if quick else 50, folder, signal.SIGKILL, 0, progress)
    return kills + stops(1 if quick else 10, folder, signal.SIGTERM, 1, progress)


def do_damages(folder, quick, progress):
    return damages(6 if quick else 100, folder, 0, progress)


def do_disk(folder, quick, progress):
    return full_disk(folder) + two_at_once(folder)


def do_fuzz(folder, quick, progress):
    return fuzz(60 if quick else 500, folder)


def do_overheads(folder, quick, progress):
    return overheads(folder, 50, .15) if quick else overheads(folder)


PARTS = dict(stops=do_stops, damages=do_damages, disk=do_disk, fuzz=do_fuzz,
             overheads=do_overheads)


def endure(
    out="runs/endurance",  # the numbers go to out/endurance.json
    quick=False,  # few of everything, to see that it works?
    parts=tuple(PARTS),  # which parts to do; what the file has of others stays
    progress=True,  # show bars, and the counts?
):  # what the file holds: for each part the command, where it was made, and the rows
    "Everything that a run has to survive, and what that costs."
    from nsgf_nb.bench.protocol import provenance
    path = writable_folder(out)/"endurance.json"
    result = read_json(path) if path.exists() else {}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name in parts:
            command = f"nsgf bench endurance --parts {name}{' --quick' if quick else ''}"
            rows = PARTS[name](Path(folder), quick, progress)
            result[name] = dict(command=command, made_with=provenance("cpu"), found=rows)
            write_json(path, result)
    if progress:
        print(report(result))
        print(f"wrote {path}")
    return result


def is_lost(row):
    "Was work lost, damage overlooked, or a foreign file read with an accident?"
    if "outcome" in row:
        return row["outcome"] not in ("read", "refused")
    return not (row["survived"] and row["identical"] and row.get("detected", True))


def report(
    result,  # from `endure`
):  # text, a line for each fault and place
    "How many of each were tried, and how many were lost."
    tried = Counter()
    lost = Counter()
    for name in ("stops", "damages", "disk", "fuzz"):
        for row in result.get(name, dict(found=[]))["found"]:
            kind = f"{row['what']} ({row['at']})"
            tried[kind] += 1
            lost[kind] += is_lost(row)
    lines = [f"{kind}: {tried[kind]} tried, {lost[kind]} lost" for kind in tried]
    return "\n".join([*lines, f"all: {tried.total()} tried, {lost.total()} lost"])


def register(
    parser,  # an argparse.ArgumentParser
):
    "Add the options of the command."
    parser.add_argument("--quick", action="store_true",
                        help="few of everything, to see that it works")
    parser.add_argument("--out", default="runs/endurance",
                        help="folder for the results (default: runs/endurance)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"some of it only: {', '.join(PARTS)}")


def main(argv=None):
    "The command line; the exit code, 1 if something was lost."
    parser = argparse.ArgumentParser(description="Fault injection: what a run survives.")
    register(parser)
    args = parser.parse_args(argv)
    if not args.quick:
        print("about half an hour, and 20 GB of disk for a while", flush=True)
    result = endure(args.out, args.quick, args.parts)
    rows = [row for name in args.parts if name != "overheads" for row in result[name]["found"]]
    return int(any(map(is_lost, rows)))


if __name__ == "__main__":
    raise SystemExit(main())
