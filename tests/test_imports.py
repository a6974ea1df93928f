# SPDX-License-Identifier: Apache-2.0
"""The house's shape: what may import what, what an import costs, what the module links to."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pkt_ext"

# Floors from the ground up; a module imports from its own floor or below, never above.
FLOORS = [
    {"errors", "heap", "artifact", "console", "settings", "build_info", "_C", ""},
    {"ops"},
    {"models"},
    {"streaming"},
    {"rendering"},
    {"data", "paired_data", "adapter", "attached", "delta", "merge", "lora"}
    | {"attribution", "objectives"},
    {"baselines", "training_needs", "training", "alignment_trainer"},
    {"methods", "finetune"},
    {"demo", "demo_steering", "demo_world", "bench", "probe", "compat"},
    {"plan"},
    {"verbs"},
    {"recipes"},
    {"cli"},
    {"__main__"},
]


def room_of(module: str) -> str:
    """pkt_ext.streaming.blocks -> streaming; pkt_ext -> the empty name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def floor_of(room: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if room in floor)


def imported_modules(path: Path) -> set[str]:
    """Every module of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "pkt_ext"}


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":  # names are looked up lazily
        return
    for module in imported_modules(path):
        assert floor_of(room_of(module)) <= floor_of(room), f"{path.name} imports {module}"


def test_c_sources_include_no_torch_and_no_neighbour():
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix not in (".h", ".cuh", ".cpp", ".cu"):
            continue
        for include in re.findall(r'#include [<"]([^>"]+)', path.read_text()):
            top = include.split("/")[0]
            assert top not in ("torch", "ATen", "c10"), f"{path}: {include}"
            if (ROOT / "csrc" / top).is_dir():
                allowed = {"core", path.relative_to(ROOT / "csrc").parts[0]}
                assert top in allowed, f"{path} includes its neighbour {include}"


def test_import_loads_nothing_heavy():
    script = (
        "import sys, pkt_ext\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_resolve():
    import pkt_ext

    for name in pkt_ext.__all__:
        assert getattr(pkt_ext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pkt_ext.nonsense  # noqa: B018


TORCH_SYMBOL = re.compile(r"(c10|2at|torch)")


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols")
def test_compiled_module_needs_no_symbol_of_torch():
    from pkt_ext import _C

    listed = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True)
    symbols = listed.stdout.decode().split()
    assert "PyErr_SetString" in symbols  # the listing worked
    assert not [name for name in symbols if TORCH_SYMBOL.search(name)]
    # the pattern does catch torch's own library
    import torch

    library = next(Path(torch.__file__).parent.glob("lib/libtorch_python.so"))
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True)
    assert TORCH_SYMBOL.search(listed.stdout.decode())


def test_build_info_names_what_was_built():
    from pkt_ext.build_info import info

    facts = info()
    assert (
        facts["pkt_ext"] == re.search(r'version = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]
    )
    assert facts["kernels on the CPU"] == "yes"
    assert facts["kernels on CUDA"].split(":")[0] in ("yes", "no")
