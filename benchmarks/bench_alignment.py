# SPDX-License-Identifier: Apache-2.0
"""The contests of pkt_ext.bench.alignment."""

STEM = "alignment"


def bench_alignment(case, measure):
    measure(case)
