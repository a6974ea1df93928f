# SPDX-License-Identifier: Apache-2.0
"""The contests of pkt_ext.bench.streaming."""

STEM = "streaming"


def bench_streaming(case, measure):
    measure(case)
