"""Make README.md from nbs/index.ipynb; with --check, only say whether README.md is that.

Cells are shown as Quarto would: `#| hide` and `#| include: false` drop a cell, `#| echo: false` its source,
`#| output: false` its outputs. Links relative to nbs/ become relative to the root. Pictures that a cell
printed go to README_files/; a picture that the text links stays where it is.
"""
import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
notebook = root/"nbs"/"index.ipynb"
header = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->\n\n"
pictures = "README_files"


def from_root(text):
    "Links and image sources relative to nbs/, made relative to the root."
    def swap(match):
        target = match[2]
        if re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target): return match[0]
        return f"{match[1]}{normpath(f'nbs/{target}')}"
    return re.sub(r"(\]\(|src=\")([^)\s\"]+)", swap, text)


def shown(cell):
    "The cell as a reader should see it, or None."
    if cell.cell_type == "markdown": cell.source = from_root(cell.source)
    if cell.cell_type != "code": return cell
    flags = dict(re.findall(r"^#\|\s*([\w-]+):?[ \t]*(\S*)", cell.source, re.M))
    if "hide" in flags or flags.get("include") == "false": return None
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    if flags.get("echo") == "false": cell.source = ""
    if flags.get("output") == "false": cell.outputs = []
    return cell if cell.source or cell.outputs else None


def convert():
    "The text of README.md and the pictures that belong to it: {path from the root: bytes}."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [cell for cell in map(shown, nb.cells) if cell is not None]
    nb.metadata["language_info"] = {"name": "python"}  # which nbdev_clean removed, and colours the code
    resources = {"unique_key": "figure", "output_files_dir": pictures}
    text, resources = MarkdownExporter().from_notebook_node(nb, resources)
    text = re.sub(r"\x1b\[[0-9;]*m|[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"^```python\n\s*```\n", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return header + text + "\n", {str(PurePosixPath(k)): v for k, v in resources.get("outputs", {}).items()}


def differences(text, files):
    "What in the work tree is not what `convert` gave."
    want = {"README.md": text.encode(), **files}
    have = {p.relative_to(root).as_posix() for p in (root/pictures).glob("*")} | {"README.md"}
    same = lambda name: (root/name).is_file() and (root/name).read_bytes() == want[name]
    return sorted({name for name in want if not same(name)} | (have - want.keys()))


def main():
    text, files = convert()
    stale = differences(text, files)
    if "--check" in sys.argv[1:]:
        return f"not what nbs/index.ipynb gives (run `make readme`): {', '.join(stale)}" if stale else 0
    for name in stale: (root/name).unlink(missing_ok=True)
    for name, content in {"README.md": text.encode(), **files}.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(content)


if __name__ == "__main__": sys.exit(main())
