"""The project as a whole: package, notebooks and README agree, and keep the rules of the layout."""
import ast
import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/"nbs").glob("*.ipynb"))
modules = sorted(path for path in (root/"nsgf_nb").rglob("*.py") if not path.stem.startswith("_"))
readme = root/"README.md"

# The table of notebooks in reading order. A module may import what stands above it.
ORDER = """
00_theory 01_from_scratch 02_sinkhorn 03_solver 04_targets 05_flow 05b_mlp 06_training
06b_dual_ascent
06c_semidiscrete 06d_likelihood 06e_models 06f_fields 07_nsgf 08_metrics
09_flow_matching 10_images 11_unet 12_nsgfpp 13_image_metrics 13b_one_step
14_files 14b_units 15_data
15b_conditions 15c_held_out
16_cuda_graphs 16b_gpu_rounds 17_settings 18_tables
20_plane 21_images 22_ablations 23_speed 24_endurance 25_tables 26_one_call
30_checkpoints 31_disk_pool 32_distributed 33_minutes
40_protocol 41_experiments 41b_image_quality 41c_classifiers 42_image_experiments
43_gradient_flows 44_jko_flow 45_comparison 46_ablations 48_speed_curves 49_speed_bench
49b_plan_bench 49c_own_data 49d_table_bench 49e_one_call_bench 49f_device_bench 50_cli
""".split()
# These may be skipped by a reader, and may be imported from above as well.
SKIPPABLE = {"solver", "files", "data", "cuda_graphs", "gpu_rounds", "settings", "tables",
             "conditions", "held_out", "units", "likelihood",
             "dual_ascent"}
HEAVY = {"geomloss", "huggingface_hub", "jax", "matplotlib", "ot", "ott", "pandas", "scipy",
         "sklearn", "torch_fidelity",
         "torchdiffeq", "torchmetrics", "torchvision"}

each_notebook = pytest.mark.parametrize("path", notebooks, ids=lambda path: path.stem)
each_module = pytest.mark.parametrize("path", modules, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def markdown_cells(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]


def python(*arguments, cwd=root):
    "Run this Python in another process: what it printed, or a failure that shows it."
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module_of(path):
    "The module that a notebook exports, such as 'runs.checkpoints'; None if it exports none."
    code = "\n".join(map(source, code_cells(path)))
    names = re.findall(r"^#\|\s*default_exp\s+(\S+)", code, re.M)
    return names[0] if names else None


def dotted(path):
    "A module's name below nsgf_nb, such as 'runs.checkpoints'."
    return ".".join(path.relative_to(root/"nsgf_nb").with_suffix("").parts)


def imports(path):
    "(module below nsgf_nb, imported name) of every import of the package in a module."
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            parts = [*package[:len(package) - node.level + 1], *parts]
        if parts[:1] != ["nsgf_nb"] or len(parts) == 1:
            continue
        for alias in node.names:
            module = parts[1:]
            if module in (["runs"], ["bench"]):  # a module of a subpackage
                module = [*module, alias.name]
            yield ".".join(module), alias.name


POSITION = {module_of(path): ORDER.index(path.stem) for path in notebooks if path.stem in ORDER}


def test_every_notebook_is_in_the_table():
    assert [path.stem for path in notebooks if path.stem != "index"] == sorted(ORDER)


@each_module
def test_imports_point_up_the_table(path):
    here = POSITION[dotted(path)]
    for module, _ in imports(path):
        assert POSITION[module] < here or module in SKIPPABLE, f"{dotted(path)} imports {module}"


@each_module
def test_the_method_does_not_know_runs_and_bench(path):
    name = dotted(path)
    if "." in name or name == "cli":
        return
    used = {module.split(".")[0] for module, _ in imports(path)}
    assert used & {"runs", "bench", "cli"} == set()


@each_module
def test_no_private_name_crosses_a_module(path):
    assert [name for _, name in imports(path) if name.startswith("_")] == []


@pytest.mark.parametrize("path", sorted((root/"tests").glob("*.py")), ids=lambda path: path.stem)
def test_tests_use_no_private_name(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"from nsgf_nb[\w.]* import [^\n]*\b_[a-z]\w*", text) == []
    assert re.findall(r"""setattr\([^,\n]+, ["']_[a-z]\w*["']""", text) == []


@each_module
def test_modules_are_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_every_notebook_of_part_1_is_linked_from_the_readme():
    text = readme.read_text(encoding="utf-8")
    part_1 = [name for name in ORDER if name < "20"]
    assert [name for name in part_1 if f"(nbs/{name}.ipynb)" not in text] == []


def words(cells):
    return sum(len(re.findall(r"\w+", source(cell))) for cell in cells)


def test_an_evening_is_enough():
    counts = {path.stem: words(markdown_cells(path)) for path in notebooks}
    evening = [path.stem for path in notebooks
               if path.stem < "20" and module_of(path) not in SKIPPABLE]
    assert sum(counts[name] for name in evening) <= 12_000
    assert sum(counts.values()) <= 27_000
    assert len(re.findall(r"\w+", readme.read_text(encoding="utf-8"))) <= 900


def test_the_package_is_what_the_notebooks_export(tmp_path):
    copied = [*notebooks, root/"settings.ini", root/"nsgf_nb"/"__main__.py",
              *(root/"nsgf_nb").rglob("__init__.py")]
    for path in copied:
        copy = tmp_path/path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    python("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=tmp_path)

    def package(folder):
        return {str(path.relative_to(folder)): path.read_text(encoding="utf-8")
                for path in folder.rglob("*.py")}
    fresh = package(tmp_path/"nsgf_nb")
    ours = package(root/"nsgf_nb")
    assert sorted(fresh) == sorted(ours)
    assert [name for name in fresh if fresh[name] != ours[name]] == [], "run nbdev_export"


def test_the_readme_is_made_from_index():
    python("tools/readme.py", "--check")


def test_nothing_points_to_a_repository_that_may_not_exist():
    "As long as settings.ini says `published = False`."
    owner = re.search(r"^user = (\S+)", (root/"settings.ini").read_text(), re.M)[1]
    published = re.search(r"^published = (\S+)", (root/"settings.ini").read_text(), re.M)[1]
    assert published == "False"
    for path in [readme, *notebooks]:
        text = path.read_text(encoding="utf-8")
        assert f"{owner}/" not in text and "Open In Colab" not in text, path.name


def test_the_switch_adds_colab_links_and_takes_them_away(tmp_path):
    for name in ("tools/publish.py", "settings.ini", "nbs/07_nsgf.ipynb", "nbs/23_speed.ipynb"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes((root/name).read_bytes())
    settings = tmp_path/"settings.ini"
    before = (tmp_path/"nbs"/"07_nsgf.ipynb").read_text()
    settings.write_text(settings.read_text().replace("published = False", "published = True"))
    for _ in range(2):  # the second time changes nothing
        python("tools/publish.py", cwd=tmp_path)
    cells = read(tmp_path/"nbs"/"07_nsgf.ipynb")["cells"]
    assert source(cells[0]).count("Open In Colab") == 1
    assert "pip" in source(cells[1]) and "clone" not in source(cells[1])
    assert "clone" in source(read(tmp_path/"nbs"/"23_speed.ipynb")["cells"][1])
    settings.write_text(settings.read_text().replace("published = True", "published = False"))
    python("tools/publish.py", cwd=tmp_path)
    assert (tmp_path/"nbs"/"07_nsgf.ipynb").read_text() == before


@pytest.mark.parametrize("statement, absent", (
    ("import nsgf_nb", HEAVY | {"torch"}),
    ("from nsgf_nb import NSGF, NSGFPlusPlus", HEAVY),
    ("import nsgf_nb.cli", HEAVY),
))
def test_import_leaves_heavy_modules_alone(statement, absent):
    out = python("-c", f"{statement}; import sys; print(*sys.modules)")
    assert absent & set(out.split()) == set()


def test_an_unknown_name_is_a_plain_attribute_error():
    import nsgf_nb
    assert "NSGF" in dir(nsgf_nb)
    with pytest.raises(AttributeError, match="nothing"):
        _ = nsgf_nb.nothing


@each_notebook
def test_notebooks_open_with_a_title_and_one_line(path):
    assert re.fullmatch(r"# .+\n\n> .+", source(read(path)["cells"][0]))


@each_notebook
def test_notebooks_were_run_without_error(path):
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    silent = ("15_data", "48_speed_curves", "49_speed_bench")
    assert outputs or path.stem in silent, "commit the notebook with its outputs"
    assert [output["evalue"] for output in outputs if output["output_type"] == "error"] == []
    skipped = re.compile(r"skip_exec\s*:\s*true", re.I)
    assert not any(skipped.search(source(cell)) for cell in read(path)["cells"])


@each_notebook
def test_imports_have_cells_of_their_own(path):
    "nbdev runs every cell that imports something when it makes the documentation."
    for cell in code_cells(path):
        if re.search(r"^#\|\s*export", source(cell), re.M):
            continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom))
                 for node in ast.parse(source(cell)).body}
        assert kinds != {True, False}, source(cell)


@each_notebook
def test_figures_are_small(path):
    sizes = []
    for output in (output for cell in code_cells(path) for output in cell["outputs"]):
        for kind, content in output.get("data", {}).items():
            if kind == "image/svg+xml":
                sizes.append(len("".join(content)))
            elif kind.startswith("image/"):
                sizes.append(len(base64.b64decode("".join(content))))
    assert all(size < 80_000 for size in sizes) and sum(sizes) < 400_000, sizes


@pytest.mark.parametrize("path", [readme, *notebooks], ids=lambda path: path.stem)
def test_relative_links_lead_somewhere(path):
    texts = [path.read_text(encoding="utf-8")]
    if path.suffix == ".ipynb":
        texts = [source(cell) for cell in markdown_cells(path)]
    links = [link for text in texts for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z][a-z0-9+.-]*:|#", link)]
    assert [link for link in local if not (path.parent/link).exists()] == []


def test_results_are_small():
    sizes = [path.stat().st_size for path in (root/"nbs"/"results").rglob("*") if path.is_file()]
    assert sum(sizes) < 6e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ("20_plane", "21_images", "22_ablations", "23_speed",
                                  "24_endurance", "25_tables", "26_one_call"))
def test_numbers_shown_are_those_of_the_results(name):
    "A notebook that reads results prints the same again: no number in it is older than its file."
    import nbformat
    from nbclient import NotebookClient
    path = root/"nbs"/f"{name}.ipynb"
    committed = nbformat.read(path, 4)
    resources = dict(metadata=dict(path=root/"nbs"))
    client = NotebookClient(nbformat.read(path, 4), timeout=300, kernel_name="python3",
                            resources=resources)
    again = client.execute()

    def printed(cell):
        texts = []
        for output in cell.get("outputs", []):
            if output.get("name") != "stderr":
                data = output.get("data", {})
                texts.append(output.get("text", "") or data.get("text/markdown", ""))
        return "".join(texts)
    for before, now in zip(committed.cells, again.cells):
        assert printed(now) == printed(before), before.source
