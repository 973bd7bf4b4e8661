"""Tables as points and back, and the commands that take a file: fit, sample, evaluate."""
import json
import math
import os
import pickle
import signal
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from conftest import fails

from nsgf_nb.bench import own_data
from nsgf_nb.bench.own_data import (
    classifier_auc,
    compare_samples,
    evaluate_file,
    fit_file,
    split_rows,
    write_rows,
)
from nsgf_nb.bench.protocol import provenance
from nsgf_nb.files import load_tensors
from nsgf_nb.nsgf import NSGF
from nsgf_nb.tables import Column, Table, read_data
from nsgf_nb.targets import sample_2d
from nsgf_nb.training import Trainer

pandas = pytest.importorskip("pandas")
TINY = ("--set", "train_steps=4", "width=8", "depth=1", "pool_size=128", "minibatch=32")
rng = numpy.random.default_rng(0)


def people(n=200):
    age = rng.integers(18, 80, n)
    return pandas.DataFrame({
        "age": age, "income": numpy.exp(rng.normal(9, .4, n) + age/80),
        "town": rng.choice(["Bern", "Ulm", "Wien"], n), "member": rng.random(n) < .3})


@pytest.fixture
def nsgf(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    people().to_csv("people.csv", index=False)
    return partial(command, ("nsgf", "\t", " "))


# ---- tables

def test_a_table_comes_back_with_its_kinds():
    frame = people()
    table = Table.of(frame)
    assert [c.kind for c in table.columns] == ["integer", "number", "category", "category"]
    points = table.to_points(frame)
    assert points.shape == (200, 1 + 1 + 3 + 2) and points.dtype == torch.float64
    back = table.to_frame(points)
    assert back["member"].tolist() == [str(value) for value in frame["member"]]
    pandas.testing.assert_frame_equal(back[["age", "income", "town"]],
                                      frame[["age", "income", "town"]], check_dtype=False)
    other = Table.from_description(json.loads(json.dumps(table.describe())))
    assert other.columns == table.columns
    assert torch.equal(other.to_points(frame[frame.columns[::-1]]), points)


def test_points_beyond_the_data_become_rows_within_it():
    table = Table([Column("a", "integer", 0, 3, 0), Column("b", "number", -1, 1),
                   Column("c", "category", categories=("x", "y"))])
    rows = table.to_frame(torch.tensor([[9., -7., .2, .1], [1.4, .5, -3., -2.]]))
    assert rows.to_dict("list") == {"a": [3, 1], "b": [-1, .5], "c": ["x", "y"]}


def test_numbers_have_the_decimals_and_the_few_values_of_their_column():
    n = 200
    frame = pandas.DataFrame({
        "price": (rng.normal(size=n)*100).round(2), "dose": rng.choice([.1, .25, 1/3], n),
        "rare": [0, 1]*(n//2), "free": rng.normal(size=n)})
    price, dose, rare, free = Table.of(frame).columns
    assert (price.decimals, price.levels) == (2, ()) and free.decimals is None
    assert dose.levels == (.1, .25, 1/3) and rare.kind == "integer" and rare.levels == (0, 1)
    table = Table.of(frame)
    rows = table.to_frame(table.to_points(frame) + .003)
    pandas.testing.assert_frame_equal(rows[["price", "dose", "rare"]],
                                      frame[["price", "dose", "rare"]])
    assert Table.of(frame[:4]).columns[1].levels == ()


def test_times():
    days = pandas.Series(pandas.date_range("2020-01-30", periods=3))
    frame = pandas.DataFrame({
        "day": days, "word": days.astype(str), "hour": days + pandas.Timedelta(hours=5),
        "zone": ["2020-01-01T00:00:00+02:00", "2020-01-02T01:00:00+02:00", "2020-06-01T03:00:00Z"],
        "town": ["Mai", "Ulm", "Rom"]})
    table = Table.of(frame)
    assert [c.kind for c in table.columns] == ["time"]*4 + ["category"]
    assert "2020-01-30 to 2020-02-01" in table.columns[0].summary()
    rows = table.to_frame(table.to_points(frame))
    assert rows["day"].tolist() == rows["word"].tolist() == frame["word"].tolist()
    assert rows["hour"][0] == "2020-01-30T05:00:00" and rows["zone"][0] == "2019-12-31T22:00:00"
    late = table.to_frame(table.to_points(frame) + .3)
    assert late["day"].tolist() == ["2020-01-30", "2020-01-31", "2020-02-01"]
    with pytest.raises(ValueError, match="'day' must hold times"):
        table.to_points(frame.assign(day=["x", "y", "z"]))


def test_what_is_reported_of_neighbouring_libraries():
    "New categories, integers that come back as floats, false rounding, months beyond December."
    n = 3000
    moons = sample_2d("moons", n, 0)
    frame = pandas.DataFrame({
        "x": moons[:, 0].double(), "y": moons[:, 1].double(), "code": rng.integers(0, 50, n),
        "month": rng.integers(1, 13, n), "outcome": (rng.random(n) < .3).astype(int)})
    table = Table.of(frame)
    settings = dict(train_steps=800, batch_size=256, width=96, pool_size=2**14, device="cpu")
    model = NSGF(**settings, sample_method="adams").fit(table.to_points(frame), progress=False)
    rows = table.to_frame(model.sample(2000))
    assert set(rows["code"]) <= set(range(50)) and set(rows["month"]) <= set(range(1, 13))
    assert rows["code"].dtype == rows["month"].dtype == "int64"
    assert (rows["x"] != rows["x"].round(3)).mean() > .9
    assert rows["outcome"].mean() == pytest.approx(.3, abs=.05)


FAULTS = {
    "missing": ([1, None, 3], "1 of its 3 values are missing"),
    "infinite": ([1., math.inf, 3], "infinite"),
}


@pytest.mark.parametrize("values, words", FAULTS.values(), ids=FAULTS)
def test_columns_that_are_not_for_a_model(values, words):
    with pytest.raises(ValueError, match=f"'bad': .*{words}"):
        Table.of(pandas.DataFrame({"good": [1, 2, 3], "bad": values}))


def test_all_faults_are_named_at_once():
    frame = pandas.DataFrame({"name": [f"n{i}" for i in range(101)], "x": [None, *range(100)]})
    with pytest.raises(ValueError, match=r"'name': it has 101 .*; 'x': 1 of its 101"):
        Table.of(frame)
    with pytest.raises(ValueError, match="several columns called a"):
        Table.of(pandas.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(ValueError, match="no column called 'income'; it has age"):
        Table.of(people()).to_points(people()[["age", "town", "member"]])


def test_a_value_of_a_category_that_was_not_seen_is_none_of_them():
    table = Table.of(people())
    stranger = people().assign(town="Rom")
    with pytest.raises(ValueError, match="'town'.*'Rom'"):
        table.to_points(stranger)


@pytest.mark.parametrize("description", ([{"name": "a"}], [{"kind": 3}], [3], None, {"a": 1}))
def test_what_describes_no_table(description):
    with pytest.raises(ValueError, match="columns of a table"):
        Table.from_description(description)


# ---- files

FRAME = pandas.DataFrame({"a": [1, 3], "b": [2.5, -4.]})


@pytest.mark.parametrize("separator", (",", ";", "\t", "|", ", "))
def test_text_files(tmp_path, separator):
    path = tmp_path/"t.csv"
    path.write_text("\n".join(separator.join(row) for row in (("a", "b"), ("1", "2.5"),
                                                              ("3", "-4"))) + "\n")
    pandas.testing.assert_frame_equal(read_data(path), FRAME)


def test_decimal_commas(tmp_path):
    (tmp_path/"t.csv").write_text("a;b;c\n1;2,5;x,1\n3;-4;y\n")
    assert read_data(tmp_path/"t.csv").to_dict("list") == {
        "a": [1, 3], "b": [2.5, -4.], "c": ["x,1", "y"]}


def test_the_index_that_pandas_writes_is_no_column(tmp_path):
    FRAME.to_csv(tmp_path/"t.csv")
    assert list(read_data(tmp_path/"t.csv").columns) == ["a", "b"]


def test_a_byte_order_mark_and_a_file_without_a_header(tmp_path):
    (tmp_path/"t.csv").write_bytes(b"\xef\xbb\xbfa,b\n1,2.5\n3,-4\n")
    pandas.testing.assert_frame_equal(read_data(tmp_path/"t.csv"), FRAME)
    (tmp_path/"t.csv").write_text("1,2.5\n3,-4\n")
    assert read_data(tmp_path/"t.csv").to_numpy().tolist() == [[1, 2.5], [3, -4]]


def test_arrays(tmp_path):
    x = rng.normal(size=(5, 2, 3)).astype("f4")
    numpy.save(tmp_path/"x.npy", x)
    numpy.savez(tmp_path/"x.npz", x)
    torch.save(torch.tensor(x), tmp_path/"x.pt")
    for name in ("x.npy", "x.npz", "x.pt"):
        assert torch.equal(read_data(tmp_path/name), torch.tensor(x))


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_bad_files(tmp_path, capsys):
    (tmp_path/"empty.csv").write_text("")
    (tmp_path/"one.csv").write_text("a,b\n1,2\n")
    (tmp_path/"x.txt").write_text("1")
    (tmp_path/"x.npy").write_bytes(b"no array")
    numpy.savez(tmp_path/"two.npz", a=numpy.zeros(2), b=numpy.zeros(2))
    torch.save({"x": torch.zeros(3)}, tmp_path/"dict.pt")
    (tmp_path/"evil.pt").write_bytes(pickle.dumps(Evil(), 2))
    numpy.save(tmp_path/"evil.npy", numpy.array([Evil()], dtype=object), allow_pickle=True)
    capsys.readouterr()
    for name, words in {"empty.csv": "not a table", "one.csv": "at least 2 rows, got 1",
                        "x.txt": "must end in", "x.npy": "no array", "two.npz": "one array.*a, b",
                        "dict.pt": "tensor.*dict", "evil.pt": "safely", "evil.npy": "safely",
                        "absent.csv": "no file", ".": "folder"}.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            read_data(tmp_path/name)
    assert "executed" not in capsys.readouterr().out


# ---- measuring

def test_rows_are_divided_without_overlap():
    train, held_out = split_rows(105, .1, 3)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(105))
    assert len(held_out) == 11
    assert torch.equal(split_rows(105, .1, 3)[1], held_out)
    assert not torch.equal(split_rows(105, .1, 4)[1], held_out)
    assert len(split_rows(5, 0., 0)[1]) == 0
    with pytest.raises(ValueError, match="leaves 1 of 3 rows.*--hold-out 0"):
        split_rows(3, .5, 0)


def test_good_samples_are_at_the_floor_and_bad_ones_are_not():
    x = torch.tensor(rng.normal(size=(3000, 3)))*torch.tensor([1e-3, 1., 1e3])
    train, held_out, fresh = x.split(1000)
    good = compare_samples(fresh, held_out, train)
    bad = compare_samples(fresh*torch.tensor([2., 1., 1.]), held_out, train)
    for name in ("W2", "SW2"):
        assert abs(good[name]["ratio"].mean - 1) < 4*good[name]["ratio"].se + .1
    assert bad["SW2"]["ratio"].mean > 1.5 and bad["deviations"] == pytest.approx(1, abs=.1)
    assert good["deviations"] < .1 and abs(good["auc"] - .5) < .06 and bad["auc"] > .57
    assert math.isnan(classifier_auc(numpy.zeros((3, 1)), numpy.ones((3, 1))))
    constant = torch.full((len(train), 1), .1)  # whose deviation in floating point is not 0
    whole = [torch.cat([u, constant[:len(u)]], 1) for u in (fresh[:len(train)], held_out, train)]
    assert compare_samples(*whole)["deviations"] < .1


# ---- commands

def test_from_a_file_to_a_file(nsgf):
    code, out, err = nsgf("fit", "people.csv", "-o", "m.safetensors", "--seed", "3", *TINY)
    assert code == 0, err
    for words in ("age: integer, 18 to", "town: 3 categories", "200 samples", "20 of them held out",
                  "seed 3", "train_steps=4", "blur=0.05", "wrote m.safetensors"):
        assert words in out, words
    assert not Path("m.safetensors.checkpoint").exists()
    for name in ("new.csv", "new.tsv", "new.npy"):
        code, out, _ = nsgf("sample", "m.safetensors", "-n", "30", "-o", name)
        assert code == 0 and f"wrote {name}: 30" in out
    rows = pandas.read_csv("new.csv")
    assert list(rows.columns) == ["age", "income", "town", "member"] and len(rows) == 30
    assert rows["age"].between(18, 80).all() and set(rows["town"]) <= {"Bern", "Ulm", "Wien"}
    assert pandas.read_csv("new.tsv", sep="\t").equals(rows)
    assert numpy.load("new.npy").shape == (30, 7)
    code, out, _ = nsgf("evaluate", "m.safetensors", "people.csv", "--picture", "p.png")
    assert code == 0 and "20 held-out rows" in out and "floor" in out
    assert Path("p.png").stat().st_size > 1000
    people()[["age", "town"]].to_csv("less.csv", index=False)
    fails(nsgf("evaluate", "m.safetensors", "less.csv"), "no column called 'income'; it has age")
    _, about = load_tensors("m.safetensors")
    assert about["held_out"] == {"share": .1, "seed": 3} and about["data"] == "people.csv"
    assert about["provenance"] == provenance("cpu") and about["settings"]["width"] == 8


def test_an_array_of_any_shape(nsgf):
    numpy.save("x.npy", rng.normal(size=(40, 4, 2)))
    assert nsgf("fit", "x.npy", "-o", "x.safetensors", "--method", "fm", *TINY[:4])[0] == 0
    fails(nsgf("sample", "x.safetensors", "-o", "x.csv"), r"\(4, 2\).*\.npy")
    assert nsgf("sample", "x.safetensors", "-n", "7", "-o", "new.npy")[0] == 0
    assert numpy.load("new.npy").shape == (7, 4, 2)
    assert "held-out" in nsgf("evaluate", "x.safetensors", "x.npy")[1]
    fails(nsgf("evaluate", "x.safetensors", "people.csv"), "people.csv has samples of shape")


@pytest.mark.filterwarnings("ignore:the samples are less diverse")
def test_a_table_and_the_generator_of_one_call(nsgf):
    tiny = ("--set", "train_steps=4", "width=8", "depth=1", "batch_size=32")
    code, out, err = nsgf("fit", "people.csv", "-o", "m.safetensors", "--method", "one-call", *tiny)
    assert code == 0 and "SinkhornGenerator on" in out and "at most 4 steps of 32" in out, err
    assert nsgf("sample", "m.safetensors", "-n", "30", "-o", "new.csv")[0] == 0
    assert len(pandas.read_csv("new.csv")) == 30
    fails(nsgf("sample", "m.safetensors", "--steps", "3", "-o", "new.csv"), "steps must be 1")
    assert "floor" in nsgf("evaluate", "m.safetensors", "people.csv")[1]
    assert not list(Path().glob("[mp]*checkpoint*"))


@pytest.mark.filterwarnings("ignore:the samples are less diverse")
@pytest.mark.parametrize("classes", (False, True))
def test_a_folder_of_images_and_the_generator_of_one_call(nsgf, monkeypatch, classes):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(own_data, "FEATURE_STEPS", 2)
    for i in range(24):
        folder = Path("pictures")/(("cats", "dogs")[i % 2] if classes else "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3)).astype("uint8")
        image.fromarray(pixels).save(folder/f"{i}.png")
    label = ("--label", "subfolder") if classes else ()
    fit = ("fit", "pictures", "-o", "p.safetensors", "--method", "one-call", *label, "--set",
           "width=8", "maps=4", "batch_size=16", "train_steps=3")
    code, out, err = nsgf(*fit)
    assert code == 0 and "within_data=True" in out and "residual_blocks=True" in out, err
    name = "classifier" if classes else "autoencoder"
    assert name in Path("p.safetensors.json").read_text()
    condition = ("--condition", "dogs") if classes else ()
    assert nsgf("sample", "p.safetensors", "-n", "4", *condition, "-o", "s.png")[0] == 0
    assert not list(Path().glob("[mp]*checkpoint*"))


def test_a_folder_of_images(nsgf):
    image = pytest.importorskip("PIL.Image")
    Path("pictures").mkdir()
    for i in range(12):
        pixels = rng.integers(0, 256, (8, 8, 3)).astype("uint8")
        image.fromarray(pixels).save(f"pictures/{i}.png")
    code, out, err = nsgf("fit", "pictures", "-o", "p.safetensors", "--set", "train_steps=2",
                          "channels=4", "batch_size=4", "pool_size=64", "minibatch=8")
    assert code == 0 and "12 samples of shape (3, 8, 8)" in out and "samples.png" in out, err
    assert nsgf("sample", "p.safetensors", "-n", "4", "--nfe", "2", "-o", "s.png")[0] == 0
    assert Path("s.png").stat().st_size > 100
    fails(nsgf("sample", "p.safetensors", "--condition", "2", "-o", "s.png"), "trained without")


def test_columns_are_chosen(nsgf):
    people().assign(note=[f"n{i}" for i in range(200)]).to_csv("p.csv", index=False)
    fails(nsgf("fit", "p.csv", *TINY), "'note'.*200 different words")
    assert nsgf("fit", "p.csv", "--drop", "note", "town", *TINY)[0] == 0
    assert [c.name for c in Table.from_description(
        load_tensors("model.safetensors")[1]["table"]).columns] == ["age", "income", "member"]
    assert nsgf("fit", "p.csv", "--columns", "age", *TINY)[0] == 0
    fails(nsgf("fit", "p.csv", "--columns", "size", *TINY), "'size'; it has age, income")
    numpy.save("x.npy", numpy.zeros((4, 2)))
    fails(nsgf("fit", "x.npy", "--columns", "a", *TINY), "--columns.*array")


def test_a_flow_for_each_class_of_a_column(nsgf):
    frame = people().assign(size=rng.integers(1, 3, 200))
    frame.to_csv("p.csv", index=False)
    code, out, err = nsgf("fit", "p.csv", "--label", "town", *TINY)
    assert code == 0 and "condition: town (classes), 3 classes in all" in out, err
    assert nsgf("sample", "model.safetensors", "-n", "60", "-o", "all.csv")[0] == 0
    rows = pandas.read_csv("all.csv")
    assert set(rows.columns) == set(frame.columns)
    assert set(rows["town"]) == {"Bern", "Ulm", "Wien"}
    ulm = ("sample", "model.safetensors", "--condition", "Ulm", "-n", "5", "-o", "u.csv")
    assert nsgf(*ulm)[0] == 0
    assert pandas.read_csv("u.csv")["town"].tolist() == ["Ulm"]*5
    fails(nsgf("sample", "model.safetensors", "--condition", "Rom", "-o", "u.csv"),
          "town must be one of Bern, Ulm, Wien, got 'Rom'")
    assert nsgf("evaluate", "model.safetensors", "p.csv")[0] == 0
    assert nsgf("fit", "p.csv", "--label", "size", *TINY)[0] == 0  # numbers are classes too
    assert nsgf("sample", "model.safetensors", "--condition", "2", "-n", "5", "-o", "u.csv")[0] == 0
    assert pandas.read_csv("u.csv")["size"].tolist() == [2]*5
    fails(nsgf("fit", "p.csv", "--label", "colour", *TINY), "'colour'; it has age")
    assert nsgf("fit", "p.csv", *TINY)[0] == 0
    fails(nsgf("sample", "model.safetensors", "--condition", "2", "-o", "u.csv"), "trained without")


def test_several_columns_are_given(nsgf):
    frame = people()
    frame.to_csv("p.csv", index=False)
    both = ("--label", "town", "--label", "age")
    code, out, err = nsgf("fit", "p.csv", *both, *TINY)
    assert code == 0 and "town (classes), age (numbers), 3 classes in all" in out, err
    asked = ("--condition", "town=Ulm", "--condition", "age=40")
    assert nsgf("sample", "model.safetensors", *asked, "-n", "5", "-o", "u.csv")[0] == 0
    rows = pandas.read_csv("u.csv")
    assert rows["town"].tolist() == ["Ulm"]*5 and rows["age"].tolist() == [40.]*5
    assert set(rows.columns) == set(frame.columns)
    fails(nsgf("sample", "model.safetensors", "--condition", "Ulm", "-o", "u.csv"),
          "--condition must be town=… age=…, got Ulm")
    fails(nsgf("sample", "model.safetensors", "-o", "u.csv"), "condition must be given.*numbers")
    assert nsgf("evaluate", "model.safetensors", "p.csv")[0] == 0


def test_classes_of_a_single_row_are_left_out(nsgf):
    frame = people().assign(size=rng.integers(1, 4, 200))
    frame.loc[0, "size"] = 77
    frame.to_csv("p.csv", index=False)
    both = ("--label", "town", "--label", "size", "--hold-out", "0")
    code, out, err = nsgf("fit", "p.csv", *both, *TINY)
    assert code == 0 and "left out: 1 rows whose class occurs only once, such as (" in out, err
    assert "9 classes in all" in out
    frame.assign(day=[f"2026-{i}" for i in range(200)]).to_csv("p.csv", index=False)
    fails(nsgf("fit", "p.csv", "--label", "day", *TINY), "--label makes 180 classes of 180 rows")
    assert nsgf("fit", "p.csv", "--drop", "town", "--drop", "size", "day", *TINY)[0] == 0
    assert [c.name for c in Table.from_description(
        load_tensors("model.safetensors")[1]["table"]).columns] == ["age", "income", "member"]


def test_quantiles_are_for_numbers(nsgf):
    frame = people().assign(rain=numpy.where(rng.random(200) < .5, 0., rng.random(200)))
    frame.to_csv("p.csv", index=False)
    quantile = (*TINY, "scale=quantile")
    fails(nsgf("fit", "p.csv", *quantile), "scale=quantile is for numbers, but town.*holds words")
    assert nsgf("fit", "p.csv", "--label", "town", "--label", "member", *quantile)[0] == 0
    assert nsgf("sample", "model.safetensors", "-n", "400", "-o", "all.csv")[0] == 0
    assert .3 < (pandas.read_csv("all.csv")["rain"] == 0).mean() < .7
    assert nsgf("evaluate", "model.safetensors", "p.csv")[0] == 0


def test_what_spreadsheets_write(nsgf):
    words = rng.choice(["00501", "01234", "90210"], 100)
    pandas.DataFrame(dict(zip=words, n=rng.integers(0, 9, 100))).to_csv("p.csv", index=False)
    assert nsgf("fit", "p.csv", *TINY)[0] == 0
    assert nsgf("sample", "model.safetensors", "-n", "50", "-o", "all.csv")[0] == 0
    made = pandas.read_csv("all.csv", dtype=str)
    assert set(made["zip"]) <= set(words) and set(made["n"]) <= set("012345678")
    pandas.DataFrame(dict(place=["Köln", "Łódź"]*50, x=rng.random(100))).to_csv(
        "p.csv", index=False, encoding="utf-16")
    fails(nsgf("fit", "p.csv", *TINY), "p.csv must be in UTF-8 .*iconv")
    frame = pandas.DataFrame(dict(x=rng.random(200), none=numpy.nan,
                                  paid=[f"{v:,.2f}" for v in rng.uniform(1e3, 1e6, 200)],
                                  on=[f"{d % 28 + 1}/{d % 12 + 1}/20{d % 90 + 10}"
                                      for d in range(200)]))
    frame.to_csv("p.csv", index=False)
    result = nsgf("fit", "p.csv", *TINY)
    fails(result, "'none': all of its values are missing")
    fails(result, "'paid': it has 200 different words, such as '.*without signs and separators")
    fails(result, "'on': it has .* times as 2026-11-28")


def test_frequent_values_come_back_as_often(nsgf):
    frame = people().assign(rain=numpy.where(rng.random(200) < .5, 0., rng.random(200)))
    frame.to_csv("p.csv", index=False)
    code, out, _ = nsgf("fit", "p.csv", "--label", "age", *TINY)
    assert code == 0 and "scale='mixed'" in out
    model = NSGF.load("model.safetensors", "cpu")
    by_quantiles = model.standardizer.z[:, 0] > -100  # the others are straight, and go on
    assert by_quantiles.tolist() == [False]*(len(by_quantiles) - 1) + [True]
    assert nsgf("sample", "model.safetensors", "-n", "400", "--condition", "40", "-o",
                "all.csv")[0] == 0
    made = pandas.read_csv("all.csv")
    assert .3 < (made["rain"] == 0).mean() < .7 and set(made["town"]) <= set(frame["town"])


def test_subfolders_are_classes(nsgf):
    from PIL import Image
    for name, level in (("dark", 40), ("light", 200)):
        for i in range(12):
            Path("photos", name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(level - 30, level + 30, (8, 8), dtype="uint8")
            Image.fromarray(pixels).save(Path("photos", name, f"{i}.png"))
    small = ("--set", "train_steps=2", "batch_size=8", "channels=4", "pool_size=64", "minibatch=8")
    code, out, err = nsgf("fit", "photos", "--label", "subfolder", *small)
    assert code == 0 and "2 classes in all" in out, err
    light = ("--condition", "light", "-n", "4", "-o", "s.npy")
    assert nsgf("sample", "model.safetensors", *light)[0] == 0
    assert numpy.load("s.npy").shape == (4, 1, 8, 8)
    fails(nsgf("sample", "model.safetensors", "--condition", "red", "-o", "s.png"),
          "condition must be one of dark, light, got 'red'")
    fails(nsgf("fit", "photos", "--label", "colour", *small), "--label must be subfolder.*colour")


def test_rows_with_missing_values(nsgf):
    frame = people()
    frame.loc[:9, "income"] = None
    frame.to_csv("p.csv", index=False)
    fails(nsgf("fit", "p.csv", *TINY), "'income'.*10 of its 200.*--drop-missing")
    code, out, _ = nsgf("fit", "p.csv", "--drop-missing", *TINY)
    assert code == 0 and "190 samples" in out
    assert nsgf("evaluate", "model.safetensors", "p.csv")[0] == 0


def test_wrong_calls(nsgf):
    fails(nsgf("fit", "absent.csv"), "no file absent.csv")
    fails(nsgf("fit", "people.csv", "-o", "m.bin"), "-o.*safetensors.*m.bin")
    fails(nsgf("fit", "people.csv", "--set", "blur"), "name=value.*'blur'")
    fails(nsgf("fit", "people.csv", "--set", "blur=-1"), "blur.*above 0.*-1")
    fails(nsgf("fit", "people.csv", "--set", "epochs=3"), "'epochs'.*NSGF")
    fails(nsgf("fit", "people.csv", "--hold-out", "1"), "--hold-out.*below 1")
    assert not list(Path().glob("*.safetensors*"))


def test_a_stopped_fit_is_resumed_to_the_same_bits(nsgf, monkeypatch):
    settings = dict(train_steps=30, width=8, depth=1, pool_size=128, minibatch=32)
    whole = fit_file("people.csv", "whole.safetensors", settings=settings)
    update = Trainer.update

    def interrupted(self, *batch):
        if self.step == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *batch)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", interrupted)
        with pytest.raises(KeyboardInterrupt, match="12 of 30"):
            fit_file("people.csv", "m.safetensors", settings=settings)
    assert Path("m.safetensors.checkpoint").is_file()
    resumed = fit_file("people.csv", "m.safetensors", settings=settings)
    assert torch.equal(resumed.sample(5), whole.sample(5))


def test_a_model_without_a_table_makes_rows_too(tmp_path):
    model = NSGF(train_steps=2, width=8, depth=1, pool_size=64, minibatch=32, device="cpu")
    model.fit(rng.normal(size=(50, 2)), progress=False)
    write_rows(model.sample(3), None, tmp_path/"x.csv")
    assert list(pandas.read_csv(tmp_path/"x.csv").columns) == ["x0", "x1"]
    model.save(tmp_path/"m.safetensors")
    people()[["age", "income"]].to_csv(tmp_path/"p.csv", index=False)
    measured = evaluate_file(model, tmp_path/"m.safetensors", tmp_path/"p.csv")
    assert measured["W2"]["ratio"].mean > 1
