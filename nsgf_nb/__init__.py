"""Neural Sinkhorn Gradient Flow: learn the velocity that carries one cloud of points onto another."""
__version__ = "0.1.0"

__all__ = ["NSGF", "NSGFPlusPlus"]

_lazy = {"NSGF": ".matching", "NSGFPlusPlus": ".nsgfpp"}  # public name -> the module it comes from, imported on first use


def __getattr__(name):
    "Import a public name on first use, so that `import nsgf_nb` alone costs next to nothing."
    if name not in _lazy: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(_lazy[name], __name__), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})
