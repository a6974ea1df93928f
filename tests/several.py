# SPDX-License-Identifier: Apache-2.0
"""Runs `pkt` commands as several processes each, as a launcher would, for test_distributed.py.

Reads lines of JSON, {"argv", "size", "kill", "spare", "fail"}. "kill" is null or [rank, n]: SIGKILL
for that process just before its n-th file operation, and at once for all the others, but not where
"spare" is true: they find out. "fail" is null or [rank, block]: an error in that process's backward
of a block. Each process is a fork of this one, which has imported everything and, with
OMP_NUM_THREADS=1, has no threads. Answers each line by one, {"codes", "seen", "out", "err"}: by
rank the exit codes, the numbers of file operations, and what was printed.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time

from pkt_ext import cli
from pkt_ext.methods import seeking  # noqa: F401 - so that no process imports it
from pkt_ext.streaming.passes import Pass

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def be(rank, command, port, outputs, counter) -> int:
    """One process of a command; its exit code."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(command["size"]),
                   "LOCAL_WORLD_SIZE": str(command["size"]), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    for number, file in zip((1, 2), outputs, strict=True):
        os.dup2(file.fileno(), number)
    count, kill, fail = 0, command.get("kill"), command.get("fail")

    def audit(event, _):
        nonlocal count
        if event in OPERATIONS:
            count += 1
            if [rank, count] == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    if fail and fail[0] == rank:
        backward = Pass._backward

        def broken(self, index):
            if index == fail[1]:
                raise RuntimeError("a fault")
            backward(self, index)

        Pass._backward = broken
    sys.addaudithook(audit)
    code = cli.run(command["argv"])
    sys.stdout.flush()
    os.write(counter, str(count).encode())
    return code


def attempt(command) -> dict:
    size, port = command["size"], free_port()
    files = [tuple(tempfile.TemporaryFile() for _ in range(2)) for _ in range(size)]
    pipes = [os.pipe() for _ in range(size)]
    children = {}
    for rank in range(size):
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = be(rank, command, port, files[rank], pipes[rank][1])
            finally:
                os._exit(code)
        children[child] = rank
    codes, left = {}, dict(children)
    end = time.monotonic() + 60
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[left.pop(child)] = os.waitstatus_to_exitcode(status)
                killed = os.WIFSIGNALED(status) and not command.get("spare")
                for other in left if killed else ():
                    os.kill(other, signal.SIGKILL)
        if time.monotonic() > end:  # they wait for each other
            for other in left:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.005)
    seen, texts = [], []
    for rank in range(size):
        os.close(pipes[rank][1])
        seen.append(int(os.read(pipes[rank][0], 32) or b"0"))
        os.close(pipes[rank][0])
        for file in files[rank]:
            file.seek(0)
        texts.append([file.read().decode() for file in files[rank]])
    out, err = zip(*texts, strict=True)
    return {"codes": [codes[r] for r in range(size)], "seen": seen, "out": out, "err": err}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)
