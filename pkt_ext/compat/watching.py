# SPDX-License-Identifier: Apache-2.0
"""Source code that reports each definition of a published name as soon as it is made.

Only the syntax tree of a module gets calls, on the lines of the definitions: the file, its line
numbers and its tracebacks stay what they are.
"""

from __future__ import annotations

import ast
import re
from types import CodeType

from pkt_ext.compat.recognition import NAMES

HOOK = "__pkt_ext_compat__"  # the built-in that is called: (namespace, name)
READY = ""  # the name it is called with where the definitions end and the script begins to work

_MENTION = re.compile(b"|".join(sorted(name.encode() for name in NAMES)))


def mentions_published_names(source: bytes) -> bool:
    """Whether any published name stands in a file's source."""
    return _MENTION.search(source) is not None


def compile_watched(source: bytes, path: str) -> CodeType:
    """Compile a file's source with the calls in it.

    Raises:
        SyntaxError, ValueError: as `compile` raises them for the source itself.
    """
    try:
        tree = compile(source, path, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        return compile(_Reporting().visit(tree), path, "exec", dont_inherit=True)
    except RecursionError:  # Python compiles deeper expressions than it shows; it reports nothing
        return compile(source, path, "exec", dont_inherit=True)


class _Reporting(ast.NodeTransformer):
    """Adds the calls to the module's own statements, those inside if, try and the like included.

    Bodies of functions and classes are not entered: what they define is no module's function.
    """

    def generic_visit(self, node):
        # no statement stands in an expression, and expressions can be deep
        return node if isinstance(node, ast.expr) else super().generic_visit(node)

    def visit_FunctionDef(self, node):
        return [node, *_reports(node, [node.name])]

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_ClassDef = visit_FunctionDef

    def visit_Assign(self, node):
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        return [node, *_reports(node, names)]

    def visit_If(self, node):
        self.generic_visit(node)
        if "__name__" not in _names(node.test) or HOOK in _names(node):
            return node  # no guard, or one inside which the definitions go on
        return [_report(node, READY), node]


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _reports(node: ast.stmt, names: list[str]) -> list[ast.stmt]:
    return [_report(node, name) for name in names if name in NAMES]


def _report(node: ast.stmt, name: str) -> ast.stmt:
    """HOOK(globals(), name), on the line where `node` begins."""
    namespace = ast.Call(ast.Name("globals", ast.Load()), [], [])
    call = ast.Call(ast.Name(HOOK, ast.Load()), [namespace, ast.Constant(name)], [])
    return ast.fix_missing_locations(ast.copy_location(ast.Expr(call), node))
