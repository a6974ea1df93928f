# SPDX-License-Identifier: Apache-2.0
"""Published parametric-knowledge-transfer scripts on our kernels, unchanged.

    python -m pkt_ext.compat SCRIPT.py args...

Importing this package loads no torch.
"""

from pkt_ext.compat.notices import PublishedBehaviour
from pkt_ext.compat.replacement import patched

__all__ = ["PublishedBehaviour", "patched"]
