"""Give every notebook its Colab badge and install cell if settings.ini says `published = True`,
and take them away if not. Both come from settings.ini; nothing else in a notebook is touched.
"""
import json
import re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
parser = ConfigParser(delimiters=["="])
parser.read(root/"settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

BADGE = re.compile(r"\n\n\[!\[Open In Colab\][^\n]*")
IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"


def badge(name):
    "The line of Markdown that opens notebook `name` in Colab."
    repository = f"{settings['user']}/{settings['repo']}/blob/{settings['branch']}"
    link = f"https://colab.research.google.com/github/{repository}/nbs/{name}"
    return f"\n\n[![Open In Colab]({IMAGE})]({link})"


def install_cell(reads_results):
    "The cell that installs the package in Colab; one that reads results gets the repository too."
    url = settings["git_url"]
    lines = [
        "#| eval: false",
        "#| echo: false",
        "import sys",
        "",
        'if "google.colab" in sys.modules:',
        f'    get_ipython().run_line_magic("pip", "install -q git+{url}")',
    ]
    if reads_results:
        lines += [
            f'    get_ipython().system("git clone -q --depth 1 {url}")',
            f'    get_ipython().run_line_magic("cd", "{settings["repo"]}/nbs")',
        ]
    return dict(cell_type="code", execution_count=None, id="colab", metadata={}, outputs=[],
                source="\n".join(lines).splitlines(keepends=True))


def update(path, published):
    "Bring one notebook into the wanted state; True if it changed."
    before = path.read_text(encoding="utf-8")
    notebook = json.loads(before)
    cells = [cell for cell in notebook["cells"] if cell.get("id") != "colab"]
    title = BADGE.sub("", "".join(cells[0]["source"]))
    if published:
        title += badge(path.name)
        text = "".join("".join(cell["source"]) for cell in cells)
        cells.insert(1, install_cell(re.search(r"""["']results/""", text) is not None))
    cells[0]["source"] = title.splitlines(keepends=True)
    notebook["cells"] = cells
    after = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    path.write_text(after, encoding="utf-8")
    return after != before


if __name__ == "__main__":
    published = settings.getboolean("published")
    changed = [path.name for path in sorted((root/"nbs").glob("*.ipynb"))
               if update(path, published)]
    state = "published" if published else "not published"
    print(f"{state}; changed: {', '.join(changed) or 'nothing'}")
