# SPDX-License-Identifier: Apache-2.0
"""float32 where a script names no dtype: transformers 5 loads the checkpoint's own instead.

The published extraction would take its scores in half precision, silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pkt_ext.compat import notices


@contextmanager
def float32_by_default() -> Iterator[None]:
    """While active, `from_pretrained` without a dtype gives float32; the auto classes' too."""
    from transformers import PreTrainedModel

    restore = give_float32(PreTrainedModel)
    try:
        yield
    finally:
        restore()


def give_float32(model_class: type, when: Callable[[], bool] = lambda: True) -> Callable[[], None]:
    """Make `PreTrainedModel.from_pretrained` give float32 where no dtype is asked for.

    Args:
        model_class: transformers' `PreTrainedModel`, in which the auto classes' calls end.
        when:        asked at each call; where it says no, the call is left as it is.

    Returns:
        What puts the method back.
    """
    import torch

    from pkt_ext.models.versions import BEFORE_5

    original = vars(model_class)["from_pretrained"]
    if BEFORE_5:
        return lambda: None  # float32 is its default

    @functools.wraps(original.__func__)
    def from_pretrained(cls, *args, **kwargs):
        asked = kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None
        if not asked and when():
            notices.once(
                "float32",
                "from_pretrained without a dtype gives float32, as it did before transformers 5",
            )
            kwargs["dtype"] = torch.float32
        return original.__func__(cls, *args, **kwargs)

    model_class.from_pretrained = classmethod(from_pretrained)
    return lambda: setattr(model_class, "from_pretrained", original)
