"""A small server on this machine in the hub's place, that keeps what is uploaded to it."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn:
    """Repositories by `models/user/name`, each with its files; `private` says what was made or is there.

    Attributes:
        refuses: paths in a repository whose upload is refused, each so many times.
        readers: repositories in which nothing may be written.
        gate: uploads wait until it is open.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuses: dict[str, int] = {}
        self.readers: set[str] = set()
        self.tokens: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.address = ""

    def add(self, repo: str, *, private: bool = True) -> None:
        """Make a repository, as somebody has done before."""
        self.files[repo], self.private[repo] = {}, private

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status, and JSON or bytes."""
        if path == "api/whoami-v2":
            return 200, {"type": "user", "name": "me"}
        if path == "api/repos/create":
            told = json.loads(body)
            repo = f"{told.get('type', 'model')}s/{told['organization']}/{told['name']}"
            self.add(repo, private=bool(told.get("private") or told.get("visibility") == "private"))
            return 200, {"url": f"{self.address}/{_visible(repo)}"}
        named = [name for name in self.files if f"api/{name}" in path or f"{_visible(name)}/resolve/" in path]
        if not named:
            return 404, {}
        repo = named[0]
        rest = path.removeprefix(f"api/{repo}").strip("/")
        if "/resolve/" in path:
            found = self.files[repo].get(path.split("/resolve/")[1].partition("/")[2])
            return (404, {}) if found is None else (200, found)
        if rest == "auth-check/write":
            return (403 if repo in self.readers else 200), {}
        if rest.startswith("preupload/"):
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": name, **plain} for name in names]}
        if rest.startswith("commit/"):
            return self._commit(repo, body)
        if rest.startswith("tree/"):
            listed = [(name, hashlib.sha1(data).hexdigest(), len(data)) for name, data in self.files[repo].items()]
            return 200, [{"type": "file", "path": name, "oid": oid, "size": size} for name, oid, size in listed]
        siblings = [{"rfilename": name} for name in self.files[repo]]
        about = {"id": repo.partition("/")[2], "modelId": repo, "sha": COMMIT, "tags": [], "siblings": siblings}
        return 200, {**about, "private": self.private[repo], "author": "me", "downloads": 0, "likes": 0}

    def _commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        self.gate.wait(20)
        lines = [json.loads(line) for line in body.splitlines()]
        sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        for name in sent:
            if self.refuses.get(name, 0) > 0:
                self.refuses[name] -= 1
                return 400, {"error": "not today"}
        self.files[repo] |= {name: base64.b64decode(content) for name, content in sent.items()}
        page = f"{self.address}/{repo}/commit/{COMMIT}"
        return 200, {"commitUrl": page, "commitOid": COMMIT, "hookOutput": "", "pullRequestUrl": None}


def _visible(repo: str) -> str:
    """The repository as it stands in the addresses of files."""
    return repo.removeprefix("models/")


@contextmanager
def hub_stand_in() -> Iterator[StandIn]:
    """The server, running."""
    hub = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
                body = b"".join(iter(self._chunk, b""))
            if token := self.headers.get("Authorization"):
                hub.tokens.add(token)
            status, said = hub.answer(self.command, self.path.partition("?")[0].strip("/"), body)
            raw = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            headers = {"Content-Length": str(len(raw)), "X-Repo-Commit": COMMIT}
            headers["ETag"] = f'"{hashlib.sha256(raw).hexdigest()}"'
            headers["Content-Type"] = "application/octet-stream" if isinstance(said, bytes) else "application/json"
            if status == 404:
                headers["X-Error-Code"] = "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound"
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            data = self.rfile.read(size)
            self.rfile.readline()
            return data

        def do_GET(self) -> None:  # the base class calls it so
            self._serve()

        def do_HEAD(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()
