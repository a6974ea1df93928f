# SPDX-License-Identifier: Apache-2.0
"""How a configuration says its weights are quantised: what is read, what is refused and why.

bitsandbytes' three ways store each matrix by itself and are undone matrix by matrix. Every other
way is refused by its name, with what to do instead.
"""

from __future__ import annotations

from dataclasses import dataclass

KEYS = ("quantization_config", "compression_config")  # of a configuration; the second is older
_CARD = "use the unquantised checkpoint that its model card names as base model"

_REFUSED = {  # quant_method -> what people call it
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "compressed-tensors": "compressed-tensors (FP8 or integers)",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "hqq": "HQQ",
    "gguf": "GGUF",
}
_UNDONE = {  # quant_method -> the class that has transformers undo it, and what else that needs
    "fp8": ("FineGrainedFP8Config", ""),
    "compressed-tensors": ("CompressedTensorsConfig", " (pip install compressed-tensors)"),
}


@dataclass(frozen=True)
class Quantisation:
    """How the matrices of a checkpoint are quantised; what is computed with is dequantised."""

    method: str  # "bitsandbytes"
    bits: int  # 4 or 8
    type: str  # "nf4", "fp4" or "int8"
    double: bool  # the scales are quantised too

    def __str__(self) -> str:
        return f"{self.method} {self.type}{' with double quantisation' if self.double else ''}"


def settings_of(config) -> dict:
    """What the configuration says about quantisation; {} where it says nothing."""
    settings = config.to_dict()
    found = next((settings[key] for key in KEYS if settings.get(key)), {})
    return found if isinstance(found, dict) else found.to_dict()


def refusal(config) -> str | None:
    """Why weights quantised in this way are not read, and what to do; None where they are."""
    settings = settings_of(config)
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return None  # by bitsandbytes, before methods had names
    method = str(getattr(method, "value", method or "an unnamed method")).lower()
    if not settings or method == "bitsandbytes":
        return None
    title, way = _REFUSED.get(method, method), f"{_CARD} (NF4, FP4 and int8 of bitsandbytes are)"
    if method in _UNDONE:
        name, needs = _UNDONE[method]
        way = (
            f"{_CARD}, or undo it once{needs}: AutoModelForCausalLM.from_pretrained(NAME, "
            f"dtype='bfloat16', quantization_config=transformers.{name}(dequantize=True))"
            ".save_pretrained(FOLDER, save_original_format=False)"
        )
    return f"its weights are quantised with {title}, which is not read; {way}"


def gguf(name: str) -> str:
    """What to do about a GGUF file, or a folder or repository of them."""
    return (
        f"{name}: GGUF, which is not read; use the safetensors checkpoint that it was made from, "
        "or write one (pip install gguf): AutoModelForCausalLM.from_pretrained(NAME, "
        "gguf_file=FILE, quantization_config=transformers.GgufConfig(dequantize=True))"
        ".save_pretrained(FOLDER, save_original_format=False) and "
        "AutoTokenizer.from_pretrained(NAME, gguf_file=FILE).save_pretrained(FOLDER)"
    )
