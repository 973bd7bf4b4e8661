"""Make README.md from nbs/index.ipynb; with --check, only say whether README.md is that.

Cells are shown as Quarto would show them: `#| hide` and `#| include: false` drop a cell,
`#| echo: false` its source, `#| output: false` its outputs. Links relative to nbs/ become relative
to the root. Pictures that a cell printed go to README_files/.
"""
import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
notebook = root/"nbs"/"index.ipynb"
pictures = "README_files"
header = "<!-- Made by `make readme`: edit nbs/index.ipynb, not this file. -->\n\n"


def from_root(text):
    "Links and image sources relative to nbs/, made relative to the root."
    def swap(match):
        start, target = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target):
            return match[0]
        return f"{start}{normpath(f'nbs/{target}')}"
    return re.sub(r"(\]\(|src=\")([^)\s\"]+)", swap, text)


def shown(cell):
    "The cell as a reader should see it, or None."
    if cell.cell_type == "markdown":
        cell.source = from_root(cell.source)
    if cell.cell_type != "code":
        return cell
    flags = dict(re.findall(r"^#\|\s*([\w-]+):?[ \t]*(\S*)", cell.source, re.M))
    if "hide" in flags or flags.get("include") == "false":
        return None
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    if flags.get("echo") == "false":
        cell.source = ""
    if flags.get("output") == "false":
        cell.outputs = []
    return cell if cell.source or cell.outputs else None


def convert():
    "The text of README.md, and its pictures: {path from the root: bytes}."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [cell for cell in map(shown, nb.cells) if cell is not None]
    nb.metadata["language_info"] = {"name": "python"}  # removed by nbdev_clean; it colours the code
    resources = {"unique_key": "figure", "output_files_dir": pictures}
    text, resources = MarkdownExporter().from_notebook_node(nb, resources)
    text = re.sub(r"\x1b\[[0-9;]*m|[ \t]+$", "", text, flags=re.M)  # colours, trailing blanks
    text = re.sub(r"^```python\n\s*```\n", "", text, flags=re.M)  # cells without source
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    files = {str(PurePosixPath(path)): content
             for path, content in resources.get("outputs", {}).items()}
    return header + text + "\n", files


def differences(text, files):
    "Names of files in the work tree that are not what `convert` gave."
    wanted = {"README.md": text.encode(), **files}
    present = {path.relative_to(root).as_posix() for path in (root/pictures).glob("*")}
    stale = set(present) - wanted.keys()
    for name, content in wanted.items():
        path = root/name
        if not path.is_file() or path.read_bytes() != content:
            stale.add(name)
    return sorted(stale)


def main():
    text, files = convert()
    stale = differences(text, files)
    if "--check" in sys.argv[1:]:
        if stale:
            return f"not what nbs/index.ipynb gives (run `make readme`): {', '.join(stale)}"
        return 0
    for name in stale:
        (root/name).unlink(missing_ok=True)
    for name, content in {"README.md": text.encode(), **files}.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
