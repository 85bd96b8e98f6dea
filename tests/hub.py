"""A hub on this machine: folders as repositories, answered as huggingface_hub asks for them."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    """`server.repositories`: name -> folder; `server.fetched`: (name, file) of each file that was sent."""

    def find(self):
        """Content, and the headers that go with it; None where there is nothing of that name."""
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            if name not in self.server.repositories or len(rest) > 2:
                return None
            files = sorted(path for path in self.server.repositories[name].iterdir() if path.is_file())
            if rest[:1] == ["tree"]:
                listed = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT} for p in files]
                return json.dumps(listed).encode(), {}
            siblings = [{"rfilename": path.name} for path in files]
            return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {}
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.repositories.get(name)
        if folder is None or rest[:1] != ["resolve"] or not folder.joinpath(*rest[2:]).is_file():
            return None
        content = folder.joinpath(*rest[2:]).read_bytes()
        if self.command == "GET":
            self.server.fetched.append((name, "/".join(rest[2:])))
        return content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}

    def do_GET(self):
        content, headers = self.find() or (b"", None)
        self.send_response(404 if headers is None else 200)
        for name, value in {
            "Content-Length": str(len(content)),
            **(headers or {"X-Error-Code": "EntryNotFound"}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@contextmanager
def serving(repositories):
    """A hub of these repositories (name -> folder); has `address` and `fetched`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.fetched = {name: Path(folder) for name, folder in repositories.items()}, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
