# SPDX-License-Identifier: Apache-2.0
"""Published parametric-knowledge-transfer scripts on our kernels, unchanged.

    python -m pkt_ext.compat SCRIPT.py args...

What is not replaced, and runs as published:

- modules that a script loads by itself, with `runpy.run_path` or `spec_from_file_location`;
- the script in worker processes that multiprocessing spawns.

A traceback that a script prints itself may show frames of this package.

Importing this package loads no torch.
"""

from pkt_ext.compat.notices import PublishedBehaviour
from pkt_ext.compat.replacement import patched

__all__ = ["PublishedBehaviour", "patched"]
