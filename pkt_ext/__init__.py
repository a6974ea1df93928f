# SPDX-License-Identifier: Apache-2.0
"""Cross-scale parametric knowledge transfer with C++/CUDA kernels.

Importing the package costs milliseconds: torch and transformers load with the first name used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pkt_ext")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

# public name -> the module it lives in ("" = the name is that submodule itself)
_PUBLIC = {
    "ops": "pkt_ext.ops",
    "lora": "pkt_ext.lora",
    "data": "pkt_ext.data",
    "seeking": "pkt_ext.methods.seeking",
    "laten": "pkt_ext.methods.laten",
    "semalign": "pkt_ext.methods.semalign",
    "objectives": "pkt_ext.objectives",
    "finetune": "pkt_ext.finetune",
    "artifact": "pkt_ext.artifact",
    "errors": "pkt_ext.errors",
}
_FUNCTIONS = {"sensitivity": "pkt_ext.attribution.sensitivity"}

__all__ = ["__version__", *_PUBLIC, *_FUNCTIONS]


def __getattr__(name: str):
    if name in _PUBLIC:
        return import_module(_PUBLIC[name])
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'pkt_ext' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
