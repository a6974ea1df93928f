# SPDX-License-Identifier: Apache-2.0
"""The contests of pkt_ext.bench.low_rank."""

STEM = "low_rank"


def bench_low_rank(case, measure):
    measure(case)
