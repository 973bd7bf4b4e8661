"""Neural Sinkhorn Gradient Flow: learn the velocity that carries one cloud of points onto another."""
from importlib import import_module

__version__ = "0.1.0"
__all__ = ["NSGF", "NSGFPlusPlus", "SinkhornGenerator"]

_MODULES = {  # where each public name is defined
    "NSGF": ".nsgf", "NSGFPlusPlus": ".nsgfpp", "SinkhornGenerator": ".one_step"}


def __getattr__(name):
    "Import a public name on first use, so that `import nsgf_nb` alone costs next to nothing."
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
