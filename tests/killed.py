# SPDX-License-Identifier: Apache-2.0
"""Runs `pkt` commands again and again, killed at this or that moment, as test_resume.py says.

Reads, as JSON, a list of [command, attempts]. An attempt is null (not killed), an integer (SIGKILL
just before the n-th file operation of the run) or a float (after so many seconds). Each is a fork
of this process, which has imported everything and, with OMP_NUM_THREADS=1, has no threads. Prints,
as JSON, for every command its attempts' (exit code, file operations seen).
"""

import json
import os
import signal
import sys

from pkt_ext import attached, cli  # noqa: F401 - so that no attempt imports them
from pkt_ext.methods import laten, seeking, semalign  # noqa: F401

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def attempt(kill, argv) -> tuple[int, int]:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        count = 0

        def audit(event, _):
            nonlocal count
            if event in OPERATIONS:
                count += 1
                if count == kill and isinstance(kill, int):
                    os.kill(os.getpid(), signal.SIGKILL)

        if isinstance(kill, float):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, kill)
        sys.addaudithook(audit)
        code = cli.run(argv)
        os.write(writer, str(count).encode())
        os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    seen = os.read(reader, 32) or b"0"
    os.close(reader)
    return os.waitstatus_to_exitcode(status), int(seen)


if __name__ == "__main__":
    found = [[attempt(kill, argv) for kill in kills] for argv, kills in json.load(sys.stdin)]
    print(json.dumps(found))
