# SPDX-License-Identifier: Apache-2.0
"""The contests of pkt_ext.bench.max_window."""

STEM = "max_window"


def bench_max_window(case, measure):
    measure(case)
