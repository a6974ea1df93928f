# SPDX-License-Identifier: Apache-2.0
"""The contests of pkt_ext.bench.sensitivity."""

STEM = "sensitivity"


def bench_sensitivity(case, measure):
    measure(case)
