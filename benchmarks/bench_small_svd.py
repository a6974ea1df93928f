# SPDX-License-Identifier: Apache-2.0
"""The contests of pkt_ext.bench.small_svd."""

STEM = "small_svd"


def bench_small_svd(case, measure):
    measure(case)
