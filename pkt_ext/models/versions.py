# SPDX-License-Identifier: Apache-2.0
"""Where transformers 4.46, which published scripts are pinned to, differs from 5: here, all of it.

The rest of the package is written for 5. What works with both as it stands needs no switch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from typing import TYPE_CHECKING

import torch
import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BEFORE_5 = int(transformers.__version__.partition(".")[0]) < 5
DTYPE = "torch_dtype" if BEFORE_5 else "dtype"  # what `from_config` and `from_pretrained` call it


def from_config(auto, config, dtype: torch.dtype) -> PreTrainedModel:
    """`auto.from_config` with the attention that transformers chooses for this configuration."""
    config = copy.deepcopy(config)
    config._attn_implementation = None  # not that of a loaded model
    # 4.46 chooses once: the configuration of a loaded model would end with eager attention
    vars(config).pop("_attn_implementation_autoset", None)
    return auto.from_config(config, **{DTYPE: dtype})


def dtype_of(config) -> torch.dtype | str | None:
    """The dtype that a configuration names, if it names one: 4.46 has it as `torch_dtype`."""
    return vars(config).get("dtype") or vars(config).get("torch_dtype")


def long_rope(config) -> int | None:
    """Up to which length rotary frequencies are those of short texts; None: they never change.

    4.46 has them in `rope_scaling`, where older checkpoints call `rope_type` just `type`.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("dynamic", "longrope"):
        return None
    name = "original_max_position_embeddings"
    return rope.get(name) or getattr(config, name, None) or config.max_position_embeddings


def as_block_output(result: object) -> object:
    """What stands for a block returns, as models want it: up to 4.46 a tuple, the states first."""
    return (result,) if BEFORE_5 and isinstance(result, torch.Tensor) else result


def key_renamer(
    model: PreTrainedModel, known: Container[str], *, stored: bool
) -> Callable[[str], tuple[str, object]]:
    """How keys of a checkpoint become parameter names of `model`, as transformers loads them.

    Args:
        known:  the model's own names.
        stored: the keys are those of files, else those of a model in memory.
    Returns:
        key -> (name, what converts the layout or None); the name may be unknown.
    """
    prefix = model.base_model_prefix
    if BEFORE_5:  # the base model's prefix is added or left out, nothing else

        def rename(key: str) -> tuple[str, object]:
            names = key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"
            return next((name for name in names if name in known), key), None

        return rename

    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model) if stored else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return lambda key: rename_source_key(key, renamings, converters, prefix, known)
