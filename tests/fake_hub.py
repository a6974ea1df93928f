# SPDX-License-Identifier: Apache-2.0
"""A small server that plays the Hub and counts what it gives; `serve` in conftest.py starts it."""

import http.server
import json
import re
import threading

COMMIT = "c" * 40
RANGE = 100_001  # bytes of a first request, of which a header is the beginning


class Hub:
    """One repository, someone/model, at one commit."""

    def __init__(self, folder):
        self.folder = folder
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.given: list[tuple[str, str, int]] = []  # (method, path, bytes of the body)
        self.status, self.error = 200, {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(*hub.answer(self.path, None), head=True)

            def do_GET(self):
                self.answer(*hub.answer(self.path, self.headers.get("range")))

            def answer(self, status, headers, body, head=False):
                hub.given.append((self.command, self.path, 0 if head else len(body)))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if not head:
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path, wanted):
        if self.status != 200:
            return self.status, self.error, b""
        tree = [
            {"type": "file", "path": name, "size": len(body), "oid": name}
            for name, body in self.files.items()
        ]
        info = {"id": "someone/model", "sha": COMMIT}
        for start, content in (("revision/main", info), (f"tree/{COMMIT}?", tree)):
            if path.startswith(f"/api/models/someone/model/{start}"):
                return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
        name = path.rpartition("/")[2]
        if path != f"/someone/model/resolve/{COMMIT}/{name}" or name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        body = self.files[name]
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if wanted is None:
            return 200, headers, body
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
        return 206, headers, body[first : last + 1]

    def bytes_of(self, suffix):
        return sum(size for _, path, size in self.given if path.endswith(suffix))

    def requests(self):
        """(method, file) of every request for a file."""
        return [(m, path.rpartition("/")[2]) for m, path, _ in self.given if "/resolve/" in path]
