# SPDX-License-Identifier: Apache-2.0
"""Which functions are published ones: by name and by the names of their parameters, in order.

Parameters are read through decorators (`inspect.signature` follows `__wrapped__`); defaults and
annotations do not matter. Functions of ours are looked up when first called, so that recognising
loads no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

# ParaKnowTransfer, extract_lora_with_sensitivity.py: module functions.
FUNCTIONS = {
    "compute_summed_area_table": ("matrix",),
    "sum_submatrix": ("sum_area_table", "top_left", "bottom_right"),
    "max_sens_submatrix": ("sens", "tgt_x", "tgt_y"),
    "calculate_sensitivity": ("model", "tokenizer", "data", "device", "loss_on_output"),
    "select_top_k_layers": ("sensitivity", "args"),
    "resize_params": ("params", "sens", "tgt_x", "tgt_y"),
    "svd": ("mat", "r"),
}

_TABLES = ("compute_summed_area_table", "sum_submatrix")

# Which of each other the published ones call, directly or not. Ours call only ours.
CALLED = {
    "max_sens_submatrix": _TABLES,
    "resize_params": ("max_sens_submatrix", *_TABLES),
}

# Those of ours without a `fix`: right as published.
NOTHING_TO_FIX = set(_TABLES)

_SCORED = ("self", "prompts", "ground_truths", "layer_idxs", "student_dim", "top")

# Neural_Incompatibility, knowledge_neurons/ and knowledge_translator.py: methods of classes.
METHODS = {
    "KnowledgeNeurons": {
        "get_top_attribute_layers": ("self", "prompts", "ground_truths", "top_cnt"),
        "get_top_attribute_neurons_ffn": _SCORED,
        "get_top_attribute_neurons_attn": _SCORED,
        "extract_ffn_attn_knowledge": (
            *("self", "ffn_neurons", "attn_neurons"),
            *("extract_ffn_module", "extract_attn_module"),
        ),
        "knowledge_injection": (
            *("self", "teacher_weights", "student_weights", "ffn_layers", "attn_layers"),
            *("ffn_neurons", "ffn_module", "attn_neurons", "attn_module"),
        ),
    },
    "Knowledge_translator": {"forward": ("self", "x", "source_idxs")},
}

# Replaced only under fix=True: as published it refuses every model_type but its own three.
CONSTRUCTORS = {
    "KnowledgeNeurons": {
        "__init__": (
            *("self", "model", "tokenizer", "model_type", "device", "is_teacher"),
            *("FFN_MODUELS", "ATTN_MODUELS"),
        )
    }
}

NAMES = frozenset(FUNCTIONS) | frozenset(METHODS)


def our_functions() -> ModuleType:
    """The module of our functions, loaded."""
    return import_module("pkt_ext.compat.paraknowtransfer")


def our_method(cls: str, name: str) -> Callable:
    """Our method as a plain function, for a `self` of any class; its module is loaded."""
    ours = getattr(import_module("pkt_ext.compat.neural_incompatibility"), cls)
    return inspect.getattr_static(ours, name)


def difference(value: object, parameters: tuple[str, ...]) -> str | None:
    """Why `value` is not the published function of these parameters; None where it is."""
    if not inspect.isfunction(value):
        return f"an object of {type(value).__name__}, not a function"
    try:
        plain = inspect.unwrap(value)
        found = inspect.signature(value).parameters
    except (TypeError, ValueError):
        plain = None
    if not inspect.isfunction(plain):
        return "a function whose decorators hide its parameters"
    if any(test(plain) for test in _SUSPENDED):
        return "a generator or a coroutine"
    ordinary = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in found.values())
    if tuple(found) == parameters and ordinary:
        return None
    return f"its parameters are ({_listed(found.values())}), published ({', '.join(parameters)})"


_SUSPENDED = (
    inspect.isgeneratorfunction,
    inspect.iscoroutinefunction,
    inspect.isasyncgenfunction,
)
_STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _listed(parameters) -> str:
    return ", ".join(_STARS.get(p.kind, "") + p.name for p in parameters)
