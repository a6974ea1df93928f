# SPDX-License-Identifier: Apache-2.0
"""The cases of every stem: named shapes of real models, or of real ones scaled down, said so.

`pkt bench` and the pytest wrappers in benchmarks/ run this one list. "13b" and "7b" are Llama 2's.
"""

from __future__ import annotations

import torch

from pkt_ext.bench.alignment import HeadKl, KlRows
from pkt_ext.bench.low_rank import LowRank
from pkt_ext.bench.max_window import Window
from pkt_ext.bench.neuron_score import Neurons
from pkt_ext.bench.sensitivity import Elementwise, Linear
from pkt_ext.bench.small_svd import CholeskyInverse, Svd
from pkt_ext.bench.streaming import Streamed
from pkt_ext.errors import InputError

Spec = (
    Elementwise
    | Linear
    | Window
    | LowRank
    | Svd
    | CholeskyInverse
    | Streamed
    | Neurons
    | KlRows
    | HeadKl
)

SIZES = ("small", "default", "full")  # full has the default's cases too
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

_RAGGED = tuple(range(23, 343, 10))  # 32 samples, 178 tokens on average
_WINDOWS = [
    Window("llama2-13b.q_proj -> 7b", 5120, 5120, 4096, 4096),
    Window("llama2-13b.up_proj -> 7b", 13824, 5120, 11008, 4096),
]
_MORE_WINDOWS = [
    Window("llama2-13b.down_proj -> 7b", 5120, 13824, 4096, 11008),
    Window("llama2-13b.lm_head -> 7b", 32000, 5120, 32000, 4096),
]

_SMALL: dict[str, list[Spec]] = {  # seconds for all: CI runs them
    "sensitivity": [
        Elementwise("tiny", 160, 120),
        Linear("tiny", 160, 120, (20, 20, 20)),
        Linear("tiny, ragged", 96, 130, (1, 33, 7), BF16),
        Linear("tiny, sums only", 96, 130, (1, 33, 7), sums=True),
    ],
    "max_window": [Window("tiny", 160, 160, 128, 128)],
    "low_rank": [LowRank("tiny", 640, 576, 8, "spiked", stride=1200)],
    "small_svd": [Svd("tiny", 3, 20), CholeskyInverse("tiny", 3, 20)],
    "neuron_score": [
        Neurons("tiny", 150, 40, 700, 2),
        Neurons("tiny, best", 150, 40, 700, rate=0.08, dtype=FP16),
    ],
    "alignment": [KlRows("tiny", 37, 701), HeadKl("tiny", 20, 24, 40, 300)],
    "streaming": [Streamed("tiny", 64, 96, 2, 300, 2, 20)],
}
_SMALL_SVDS = [  # a Krylov basis of one LoRA rank 16 extraction, for every matrix of a kind
    Svd("32 Lanczos cores", 32, 96),
    CholeskyInverse("32 Gram matrices", 32, 64),
]
_NEURONS = [  # of a small Llama, and of real ones scaled down
    Neurons("llama 256 wide, FFN, fp16", 688, 256, 32000, dtype=FP16),
    Neurons("llama 256 wide, FFN, best 8 %", 688, 256, 32000, rate=0.08),
    Neurons("llama2-7b.down_proj / 8, best 8 %", 1376, 512, 32000, rate=0.08, dtype=BF16),
]
_MORE_NEURONS = [
    Neurons("llama 256 wide, FFN, 8 samples", 688, 256, 32000, 8, dtype=FP16),
    Neurons("llama2-7b.down_proj / 4, best 8 %", 2752, 1024, 32000, rate=0.08, dtype=BF16),
    Neurons("qwen2.5-0.5b.o_proj, best 8 %", 896, 896, 151936, rate=0.08, dtype=BF16),
]
_MORE_SMALL_SVDS = [
    Svd("32 Lanczos cores, float64", 32, 96, torch.float64),
    Svd("32 wide Lanczos cores", 32, 160),
    CholeskyInverse("224 Gram matrices", 224, 64),
]

CASES: dict[tuple[str, str], dict[str, list[Spec]]] = {
    ("cpu", "small"): _SMALL,
    ("cuda", "small"): _SMALL,
    ("cpu", "default"): {
        "sensitivity": [
            Elementwise("llama2-13b.q_proj", 5120, 5120),
            Elementwise("llama2-13b.q_proj, bf16", 5120, 5120, BF16),
            Linear("llama2-7b.q_proj, 8 x 64", 4096, 4096, (64,) * 8),
            Linear("llama2-7b.up_proj / 4, 16 x 32", 2752, 1024, (32,) * 16),
            Linear("llama2-7b.up_proj / 4, 8 x 64", 2752, 1024, (64,) * 8),
            Linear("llama2-7b.up_proj / 4, 4 x 256", 2752, 1024, (256,) * 4),
            Linear("llama2-7b.up_proj / 4, ragged", 2752, 1024, (23, 170, 64, 111, 5, 139)),
            Linear("llama2-7b.up_proj / 4, sums", 2752, 1024, (64,) * 8, sums=True),
        ],
        "max_window": _WINDOWS,
        "low_rank": [
            LowRank("llama2-13b.q_proj window", 4096, 4096, 16, "power", 5120),
            LowRank("llama2-13b.up_proj window", 11008, 4096, 16, "spiked", 5120),
        ],
        "small_svd": _SMALL_SVDS,
        "neuron_score": _NEURONS,
        "alignment": [
            KlRows("llama2 logits", 512, 32000),
            HeadKl("llama2-13b -> 7b, heads / 4", 128, 1024, 1280, 32000),
        ],
        "streaming": [Streamed("llama, 14 M weights", 512, 1408, 2, 8000, 4, 128)],
    },
    ("cpu", "full"): {
        "sensitivity": [
            Elementwise("llama2-13b.up_proj", 13824, 5120),
            Elementwise("llama2-13b.up_proj, bf16, sums", 13824, 5120, BF16, sums=True),
            Linear("llama2-7b.q_proj, 8 x 170", 4096, 4096, (170,) * 8),
            Linear("llama2-7b.q_proj, 8 x 170, bf16", 4096, 4096, (170,) * 8, BF16),
            Linear("llama2-13b.up_proj, 2 x 170", 13824, 5120, (170,) * 2),
        ],
        "max_window": _MORE_WINDOWS,
        "low_rank": [
            LowRank("llama2-7b.q_proj, fp32", 4096, 4096, 16, "spiked", dtype=FP32, shrink=1),
            LowRank("llama2-7b.up_proj, whole SVD", 11008, 4096, 16, "spiked", shrink=1),
            LowRank("llama2-13b.q_proj window, rank 64", 4096, 4096, 64, "spiked", 5120),
            LowRank("llama2-13b.q_proj window, flat", 4096, 4096, 16, "flat", 5120),
            LowRank("llama2-7b.embed_tokens", 4096, 32000, 16, "spiked"),
        ],
        "small_svd": _MORE_SMALL_SVDS,
        "neuron_score": _MORE_NEURONS,
        "alignment": [
            KlRows("qwen2.5 logits", 128, 151936),
            HeadKl("qwen2.5-1.5b -> 0.5b", 110, 896, 1536, 151936),
            HeadKl("llama2-13b -> 7b, heads / 4, bf16", 128, 1024, 1280, 32000, BF16),
        ],
        "streaming": [
            Streamed("llama, 43 M weights", 768, 2048, 4, 16000, 4, 128),
            Streamed("llama, 0.5 G weights", 2048, 5632, 8, 32000, 4, 256),
            Streamed("llama, 0.5 G weights, bf16", 2048, 5632, 8, 32000, 4, 256, BF16),
        ],
    },
    ("cuda", "default"): {
        "sensitivity": [
            Elementwise("llama2-13b.up_proj, bf16", 13824, 5120, BF16),
            Linear("llama2-13b.up_proj, 32 x 64", 13824, 5120, (64,) * 32, BF16),
            Linear("llama2-13b.up_proj, 32 x 170", 13824, 5120, (170,) * 32, BF16),
            Linear("llama2-13b.q_proj, 32 x 170", 5120, 5120, (170,) * 32, BF16),
            Linear("llama2-13b.q_proj, 32 ragged", 5120, 5120, _RAGGED, BF16),
        ],
        "max_window": _WINDOWS,
        "low_rank": [LowRank("8 llama2-13b.up_proj windows", 11008, 4096, 16, "spiked", 5120, 8)],
        "small_svd": _SMALL_SVDS,
        "neuron_score": [
            Neurons("llama2-13b.down_proj", 13824, 5120, 32000, dtype=BF16),
            Neurons("llama2-13b.down_proj, 8 samples", 13824, 5120, 32000, 8, dtype=BF16),
            Neurons("llama2-13b.down_proj, best 8 %", 13824, 5120, 32000, rate=0.08, dtype=BF16),
        ],
        "alignment": [
            KlRows("llama2 logits", 1024, 32000),
            KlRows("qwen2.5 logits", 1024, 152064),
            HeadKl("llama2-13b -> 7b", 5440, 4096, 5120, 32000, BF16),
        ],
        "streaming": [Streamed("4 llama2-13b blocks", 5120, 13824, 4, 32000, 4, 512, BF16)],
    },
    ("cuda", "full"): {
        "sensitivity": [
            Elementwise("llama2-13b.up_proj, fp32", 13824, 5120),
            Elementwise("llama2-13b.up_proj, fp16", 13824, 5120, FP16),
            Elementwise("llama2-13b.up_proj, bf16, sums", 13824, 5120, BF16, sums=True),
            Linear("llama2-13b.q_proj, 32 x 170, sums", 5120, 5120, (170,) * 32, BF16, True),
            Linear("llama2-13b.up_proj, 32 x 512", 13824, 5120, (512,) * 32, BF16),
            Linear("llama2-13b.up_proj, 32 ragged", 13824, 5120, _RAGGED, BF16),
            Linear("llama2-13b.up_proj, 32 x 170, fp16", 13824, 5120, (170,) * 32, FP16),
            Linear("llama2-13b.q_proj, 32 x 170, fp32", 5120, 5120, (170,) * 32),
        ],
        "max_window": _MORE_WINDOWS,
        "low_rank": [
            LowRank("32 llama2-13b.up_proj windows", 11008, 4096, 16, "spiked", 5120, 32),
            LowRank("8 llama2-13b.up_proj windows, rank 64", 11008, 4096, 64, "spiked", 5120, 8),
            LowRank("8 llama2-13b.up_proj windows, rank 128", 11008, 4096, 128, "spiked", 5120, 8),
            LowRank("llama2-13b.q_proj window", 4096, 4096, 16, "power", 5120, shrink=1),
            LowRank("llama2-7b.embed_tokens", 4096, 32000, 16, "spiked"),
        ],
        "small_svd": _MORE_SMALL_SVDS,
        "neuron_score": [
            Neurons("llama2-13b.down_proj, 32 samples", 13824, 5120, 32000, 32, dtype=BF16),
            Neurons("llama2-13b.o_proj, best 8 %", 5120, 5120, 32000, rate=0.08, dtype=BF16),
            Neurons("qwen2.5-32b.down_proj, best 8 %", 27648, 5120, 152064, rate=0.08, dtype=BF16),
        ],
        "alignment": [HeadKl("qwen2.5-32b -> 7b", 5440, 3584, 5120, 152064, BF16)],
        "streaming": [Streamed("4 llama3-70b blocks", 8192, 28672, 4, 128256, 4, 512, BF16)],
    },
}

STEMS = tuple(_SMALL)


def select(stems: list[str], device_type: str, size: str) -> list[tuple[str, Spec]]:
    """(stem, case) of the stems asked for, of all where none is.

    Raises:
        InputError: an unknown stem or size.
    """
    for stem in stems:
        if stem not in STEMS:
            raise InputError(f"no stem {stem!r} to benchmark; choose from {', '.join(STEMS)}")
    if size not in SIZES:
        raise InputError(f"size is {size!r}; choose one of {', '.join(SIZES)}")
    sizes = ("default", "full") if size == "full" else (size,)
    return [
        (stem, case)
        for stem in STEMS
        if stem in stems or not stems
        for one in sizes
        for case in CASES[device_type, one][stem]
    ]
