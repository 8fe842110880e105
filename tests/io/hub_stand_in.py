"""A stand-in of the hub's HTTP API on loopback: repositories in memory, and every request noted.

Files of safetensors go the way of LFS, as on the hub, the others into the commit.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants


class Hub:
    """Repositories by name: ``{"private": …, "files": {path: content}}``.

    Attributes:
        refuse: status with which requests are refused whose path has ``refused`` in it; None for
            none.
        token: the one that is taken.
        asked: method and path of each request.
    """

    def __init__(self):
        self.repositories, self.asked, self.refuse, self.token = {}, [], None, "hf_right"
        self.endpoint, self.stored, self.refused = "", {}, ""

    def answer(self, method, path, body, token):
        """Status and JSON for a request."""
        self.asked.append(f"{method} {path}")
        if self.refuse is not None and self.refused in path:
            return self.refuse, {"error": "refused"}
        if path.startswith("/stored/"):  # an address that is signed, so without a token
            self.stored[hashlib.sha256(body).hexdigest()] = body
            return 200, {}
        if token != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [*map(self.place, json.loads(body)["objects"])],
            }
        return self.of_a_repository(path.removeprefix("/api/models/"), body)

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.endpoint}/{name}"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo"} | url
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.repositories[name] = {"private": private, "files": {".gitattributes": b""}}
        return 200, url

    def place(self, wanted):
        href = f"{self.endpoint}/stored/{wanted['oid']}"
        return wanted | {"actions": {"upload": {"href": href}}}

    def of_a_repository(self, path, body):
        owner, name, *rest = path.split("/")
        found = self.repositories.get(f"{owner}/{name}")
        if found is None:
            return 404, {"error": "Repository not found"}
        if not rest:
            siblings = [{"rfilename": file} for file in found["files"]]
            there = {"id": f"{owner}/{name}", "private": found["private"], "siblings": siblings}
            return 200, there | {"sha": 40 * "0"}
        if rest == ["preupload", "main"]:
            files = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [*map(mode, files)]}
        assert rest == ["commit", "main"], path
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                assert value["encoding"] == "base64"
                found["files"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                value = entry["value"]
                found["files"][value["path"]] = self.stored[value["oid"]]
            else:
                assert entry["key"] == "header"
        url = f"{self.endpoint}/{owner}/{name}/commit/{40 * '1'}"
        return 200, {"success": True, "commitOid": 40 * "1", "commitUrl": url}


def mode(file):
    """How a file is to be sent."""
    large = file.endswith(".safetensors")
    return {
        "path": file, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None,
    }  # fmt: skip


@contextmanager
def served(monkeypatch):
    """A hub that answers on loopback while the block runs, and that the client takes for the hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            token = self.headers.get("Authorization")
            status, found = hub.answer(self.command, path, body, token)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = reply

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
