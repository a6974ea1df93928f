# SPDX-License-Identifier: Apache-2.0
"""Tensor operations backed by the compiled kernels, each with its plain-torch reference."""

from pkt_ext.ops.low_rank import (
    LowRankReport,
    lora_factors,
    lora_factors_reference,
    truncated_svd,
    truncated_svd_reference,
)
from pkt_ext.ops.max_window import MaxWindow, max_window, max_window_reference
from pkt_ext.ops.neuron_score import (
    NeuronGains,
    neuron_log_prob_gain,
    neuron_log_prob_gain_reference,
    published_scale,
)
from pkt_ext.ops.sensitivity import (
    SensitivitySums,
    accumulate_sensitivity_,
    accumulate_sensitivity_reference_,
    linear_sensitivity_,
    linear_sensitivity_reference_,
)
from pkt_ext.ops.small_svd import (
    BatchedSvd,
    CholeskyInverse,
    batched_cholesky_inverse,
    batched_cholesky_inverse_reference,
    batched_svd,
    batched_svd_reference,
)

__all__ = [
    "BatchedSvd",
    "CholeskyInverse",
    "LowRankReport",
    "MaxWindow",
    "NeuronGains",
    "SensitivitySums",
    "accumulate_sensitivity_",
    "accumulate_sensitivity_reference_",
    "batched_cholesky_inverse",
    "batched_cholesky_inverse_reference",
    "batched_svd",
    "batched_svd_reference",
    "linear_sensitivity_",
    "linear_sensitivity_reference_",
    "lora_factors",
    "lora_factors_reference",
    "max_window",
    "max_window_reference",
    "neuron_log_prob_gain",
    "neuron_log_prob_gain_reference",
    "published_scale",
    "truncated_svd",
    "truncated_svd_reference",
]
