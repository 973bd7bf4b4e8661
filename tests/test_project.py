"""The project as a whole: the package is what the notebooks export, and both keep the rules of the design."""
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
modules = sorted(p for p in (root/"nsgf_nb").glob("*.py") if not p.stem.startswith("_"))

# module -> the modules of this package that it may import; None: any
MAP = {
    "sinkhorn": set(),
    "flow": {"sinkhorn"},
    "data": set(),
    "models": set(),
    "files": set(),
    "long_runs": {"files"},
    "ranks": set(),
    "disk_pool": {"files", "flow", "long_runs"},
    "matching": {"disk_pool", "files", "flow", "long_runs", "models", "ranks", "sinkhorn"},
    "nsgfpp": {"files", "flow", "matching", "models", "sinkhorn"},
    "image_experiment": {"data", "files", "image_metrics", "matching", "metrics", "nsgfpp", "ranks"},
    "metrics": {"sinkhorn"},
    "image_metrics": {"files", "long_runs", "metrics", "sinkhorn"},
    "speed": {"data", "files", "flow", "sinkhorn"},
    "experiment": {"data", "files", "long_runs", "matching", "metrics", "ranks"},
    "baselines": {"flow", "matching", "nsgfpp"},
    "gradient_flow_baselines": {"long_runs", "matching", "models"},
    "comparison": {"baselines", "data", "experiment", "files", "gradient_flow_baselines", "matching", "nsgfpp"},
    "ablations": {"baselines", "data", "experiment", "files", "flow", "matching", "metrics", "nsgfpp", "sinkhorn"},
    "endurance": {"data", "disk_pool", "files", "flow", "long_runs", "matching", "models"},
    "cli": None,
}
HEAVY = "geomloss", "jax", "matplotlib", "ot", "ott", "scipy", "sklearn", "torch_fidelity", "torchdiffeq", "torchmetrics", "torchvision"

each_notebook = pytest.mark.parametrize("path", notebooks, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("path", modules, ids=lambda p: p.stem)


def read(path): return json.loads(path.read_text(encoding="utf-8"))
def cells(path, kind): return [c for c in read(path)["cells"] if c["cell_type"] == kind]
def source(cell): return "".join(cell["source"])
def exported(cell): return re.search(r"^#\|\s*export", source(cell), re.M) is not None


def python(*args, cwd=root):
    "Run this Python elsewhere; what it printed, or a failure that shows it."
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imported(path):
    "The modules of this package that the file at `path` imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = "nsgf_nb." if node.level else ""
            names = [f"{package}{node.module or ''}".rstrip(".")]
            if names == ["nsgf_nb"]: names = [f"nsgf_nb.{alias.name}" for alias in node.names]
        else: continue
        found |= {name.split(".")[1] for name in names if name.startswith("nsgf_nb.")}
    return found


def test_there_is_something_to_check():
    assert notebooks and modules


@each_module
def test_imports_follow_the_map(path):
    assert path.stem in MAP, f"{path.name} is not in the map: say here what it may import"
    allowed = MAP[path.stem]
    assert allowed is None or imported(path) <= allowed


def test_nothing_in_the_map_is_a_cycle():
    done = set()
    while ready := {m for m, uses in MAP.items() if uses is not None and uses <= done} - done: done |= ready
    assert done == {m for m, uses in MAP.items() if uses is not None}


@each_module
def test_module_has_at_most_eight_public_names(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = [n.value for n in body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    assert len(names) == 1 and len(ast.literal_eval(names[0])) <= 8


def test_package_is_what_the_notebooks_export(tmp_path):
    lib = tmp_path/"nsgf_nb"
    for path in [*notebooks, root/"settings.ini", root/"nsgf_nb/__init__.py", root/"nsgf_nb/__main__.py"]:
        copy = tmp_path/path.relative_to(root)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    python("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=tmp_path)
    fresh = {p.name: p.read_text(encoding="utf-8") for p in lib.glob("*.py")}
    ours = {p.name: p.read_text(encoding="utf-8") for p in (root/"nsgf_nb").glob("*.py")}
    assert sorted(fresh) == sorted(ours)
    assert [name for name in fresh if fresh[name] != ours[name]] == [], "run nbdev_export"


def test_readme_is_made_from_index():
    python("tools/readme.py", "--check")


@pytest.mark.parametrize("statement, absent", [
    ("import nsgf_nb", {"torch", *HEAVY}),  # no slower than `import torch`, then
    ("from nsgf_nb import NSGF", set(HEAVY)),
])
def test_import_leaves_heavy_modules_alone(statement, absent):
    out = python("-c", f"{statement}; import sys; print(*sys.modules)")
    assert absent & set(out.split()) == set()


def test_unknown_name_is_a_plain_attribute_error():
    import nsgf_nb
    assert "NSGF" in dir(nsgf_nb)
    with pytest.raises(AttributeError, match="'nsgf_nb' has no attribute 'nothing'"): nsgf_nb.nothing


@each_notebook
def test_notebook_opens_with_title_badge_and_install(path):
    title, install = read(path)["cells"][:2]
    badge = f"https://colab.research.google.com/github/nsgf-nb/nsgf_nb/blob/main/nbs/{path.name}"
    assert re.match(r"# .+\n\n> .+\n", source(title)), "a title and a one-line description come first"
    assert badge in source(title)
    lines = source(install).splitlines()
    if re.search(r"""["']results/""", "".join(map(source, read(path)["cells"]))):
        clone = lines.pop()                     # a notebook that reads results needs the repository, not only the package
        assert clone.startswith('if "google.colab" in sys.modules: get_ipython().system("git clone -q')
    assert lines == [
        "#| eval: false",
        "#| echo: false",
        "import sys",
        'if "google.colab" in sys.modules: get_ipython().run_line_magic("pip", "install -q git+https://github.com/nsgf-nb/nsgf_nb")',
    ]


@each_notebook
def test_notebook_was_run_without_error(path):
    outputs = [o for c in cells(path, "code") for o in c["outputs"]]
    assert outputs, "commit the notebook with its outputs"
    assert [o["evalue"] for o in outputs if o["output_type"] == "error"] == []
    front = re.compile(r"skip_exec\s*:\s*true", re.I)
    assert not any(front.search(source(c)) for c in read(path)["cells"]), "nbdev_test would pass this unread"


def test_no_notebook_is_exempt_from_testing():
    assert not (root/"nbs"/".notest").exists()


@each_notebook
def test_exported_cells_are_short(path):
    code = lambda c: [line for line in source(c).splitlines() if line.strip() and not line.strip().startswith("#")]
    sizes = {c["id"]: len(code(c)) for c in cells(path, "code") if exported(c)}
    assert {name: size for name, size in sizes.items() if size > 30} == {}


@each_notebook
def test_figures_are_small(path):
    sizes = []
    for output in (o for c in cells(path, "code") for o in c["outputs"]):
        for kind, content in output.get("data", {}).items():
            if kind == "image/svg+xml": sizes.append(len("".join(content)))
            elif kind.startswith("image/"): sizes.append(len(base64.b64decode("".join(content))))
    assert all(size < 60_000 for size in sizes) and sum(sizes) < 400_000, sizes


@pytest.mark.parametrize("path", [root/"README.md", *notebooks], ids=lambda p: p.stem)
def test_relative_links_lead_somewhere(path):
    texts = [path.read_text(encoding="utf-8")] if path.suffix == ".md" else map(source, cells(path, "markdown"))
    links = [link for text in texts for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z][a-z0-9+.-]*:|#", link)]
    assert [link for link in local if not (path.parent/link).exists()] == []


@pytest.mark.parametrize("name", ("20b_comparison", "30_ablations", "32_endurance"))
def test_numbers_shown_are_those_of_the_results(name):
    "A notebook that only reads JSONs says the same again: no number in it is older than its file, or typed in."
    import nbformat
    from nbclient import NotebookClient
    path = root/"nbs"/f"{name}.ipynb"
    again = NotebookClient(nbformat.read(path, 4), timeout=300, kernel_name="python3", resources=dict(metadata=dict(path=root/"nbs"))).execute()
    def said(cell): return "".join(o.get("text", "") or o.get("data", {}).get("text/markdown", "") for o in cell.get("outputs", []) if o.get("name") != "stderr")
    for before, now in zip(nbformat.read(path, 4).cells, again.cells):
        if not re.search(r"^#\|\s*eval:\s*false", before.source, re.M): assert said(now) == said(before), before.source
