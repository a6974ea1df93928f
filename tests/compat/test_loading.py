# SPDX-License-Identifier: Apache-2.0
"""What `from_pretrained` gives under compat: float32 where no dtype is asked for, on any stack."""

import subprocess
import sys
import warnings
from types import ModuleType

import model_zoo
import pytest
import torch
import transformers

from pkt_ext.compat import PublishedBehaviour, loading, notices, patched


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A tiny Llama saved in float16."""
    model = model_zoo.build("llama", layers=1, hidden=8, ffn=12, heads=2).half()
    return model_zoo.save(model, tmp_path_factory.mktemp("half"))


RECENT = int(transformers.__version__.split(".")[0]) >= 5
ASKED = [{"torch_dtype": torch.float16}, {"torch_dtype": "auto"}]
if RECENT:
    ASKED += [{"dtype": torch.bfloat16}, {"dtype": "float16"}, {"dtype": "auto"}]
LOADERS = [transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM, transformers.AutoModel]


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_from_pretrained_gives_float32_where_nothing_is_asked(half, loader, told_nothing):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PublishedBehaviour)
        with loading.float32_by_default():
            assert loader.from_pretrained(half).dtype is torch.float32
            assert loader.from_pretrained(half, torch_dtype=None).dtype is torch.float32
    said = [str(warning.message) for warning in caught if "float32" in str(warning.message)]
    assert len(said) == (1 if RECENT else 0)
    assert loader.from_pretrained(half).dtype is (torch.float16 if RECENT else torch.float32)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_from_pretrained_gives_what_is_asked(half, asked, told_nothing):
    for loader in LOADERS:
        plain = loader.from_pretrained(half, **asked).dtype
        with loading.float32_by_default():
            assert loader.from_pretrained(half, **asked).dtype is plain is not torch.float32
    assert not notices._given


def test_patched_loads_float32_until_it_ends(half, told_nothing):
    script = ModuleType("script")
    exec("def svd(mat, r):\n    return 1\n", vars(script))
    load = transformers.AutoModelForCausalLM.from_pretrained
    with patched(script), warnings.catch_warnings():
        warnings.simplefilter("ignore", PublishedBehaviour)
        assert load(half).dtype is torch.float32
    notices._given.clear()
    load(half)
    assert not notices._given


def test_from_pretrained_is_left_as_it_is_where_that_is_wished(half, told_nothing):
    plain = transformers.LlamaForCausalLM.from_pretrained(half).dtype
    restore = loading.give_float32(transformers.PreTrainedModel, when=lambda: False)
    try:
        assert transformers.LlamaForCausalLM.from_pretrained(half).dtype is plain
    finally:
        restore()
    assert not notices._given


def test_a_script_that_is_recognised_loads_float32(half, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "def svd(mat, r):\n    return 1\n"
        "from transformers import LlamaForCausalLM\n"
        "print(LlamaForCausalLM.from_pretrained(sys.argv[1]).dtype)\n"
    )
    command = [sys.executable, "-m", "pkt_ext.compat", str(script), str(half)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "torch.float32\n"
    said = "without a dtype gives float32, as it did before transformers 5"
    assert done.stderr.count(said) == (1 if RECENT else 0)
