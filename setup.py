"""Build configuration: everything in it comes from settings.ini, which nbdev reads as well."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
published = cfg.getboolean("published")


def absolute(match):
    "A link or picture of the README, relative to the repository, as an address that works on PyPI."
    start, target = match.groups()
    if re.match(r"[a-z][a-z0-9+.-]*:|#", target):
        return match[0]
    kind = "blob" if start == "](" else "raw"
    return f"{start}{cfg['git_url']}/{kind}/{cfg['branch']}/{target}"


readme = (root/"README.md").read_text(encoding="utf-8")
if published:
    readme = re.sub(r"(!\[[^\[\]]*\]\(|\]\(|src=\")([^)\s\"]+)", absolute, readme)

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"] if published else None,
    license=cfg["license"],
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]),
    package_data={cfg["lib_name"]: ["weights/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split()
                    for name in ("dev", "bench", "gpu", "hub", "images", "ranks")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
