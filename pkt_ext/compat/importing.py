# SPDX-License-Identifier: Apache-2.0
"""The modules that a script imports, watched as the script itself is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from pkt_ext.compat.watching import compile_watched, mentions_published_names

_MODELS = "transformers.modeling_utils"
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_INSTALLED = {"site-packages", "dist-packages"}


class Finder:
    """Finds what the path-based finder finds, with other loaders for the user's own modules.

    Args:
        models_loaded: called with `transformers.modeling_utils` when that has been imported.
    """

    def __init__(self, models_loaded: Callable[[ModuleType], None]):
        self._models_loaded = models_loaded

    def install(self) -> None:
        """Be asked at every import from now on, after the built-in modules' finders."""
        sys.meta_path.insert(sys.meta_path.index(PathFinder), self)

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """The module's spec; None leaves it to the path-based finder behind."""
        if name.partition(".")[0] == "pkt_ext":
            return None
        spec = PathFinder.find_spec(name, path, target)
        # exactly: a loader of another kind knows better how its module is made
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        if name == _MODELS:
            spec.loader = _ModelsLoader(name, spec.origin, self._models_loaded)
            return spec
        code = _watched_code(spec.origin) if _is_users(spec.origin) else None
        if code is None:
            return None
        spec.loader = _WatchedLoader(name, spec.origin, code)
        return spec


class _WatchedLoader(SourceFileLoader):
    """Runs code made beforehand: nothing of ours stands in an importing module's traceback."""

    def __init__(self, name: str, path: str, code: CodeType):
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        return self._code


class _ModelsLoader(SourceFileLoader):
    """Tells when its module has been executed."""

    def __init__(self, name: str, path: str, loaded: Callable[[ModuleType], None]):
        super().__init__(name, path)
        self._loaded = loaded

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._loaded(module)


def _is_users(origin: str) -> bool:
    installed = not _INSTALLED.isdisjoint(Path(origin).parts)
    return not installed and not origin.startswith(_STANDARD_LIBRARY)


def _watched_code(path: str) -> CodeType | None:
    """None where nothing published is mentioned, or where Python itself shall say what is wrong."""
    try:
        source = Path(path).read_bytes()
        return compile_watched(source, path) if mentions_published_names(source) else None
    except (OSError, SyntaxError, ValueError):
        return None
