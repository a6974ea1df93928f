# SPDX-License-Identifier: Apache-2.0
"""`python -m pkt_ext.compat SCRIPT.py args...`"""

import sys

from pkt_ext.compat.running import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
