# SPDX-License-Identifier: Apache-2.0
"""Fair benchmarks of the kernels: `pkt bench`, and the case list that benchmarks/ shares with it.

One process, one run: this machine's ceilings are measured first; every contestant of a case is
checked against float64 before any is timed; then all are timed in turn, on inputs too large for the
caches, and compared side by side.
"""
