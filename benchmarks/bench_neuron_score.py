# SPDX-License-Identifier: Apache-2.0
"""The contests of pkt_ext.bench.neuron_score."""

STEM = "neuron_score"


def bench_neuron_score(case, measure):
    measure(case)
