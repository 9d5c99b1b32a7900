"""As much of the hub's API as an upload and a download need, with repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_owner"


@dataclass
class Repository:
    """Commits by their id, oldest first: of each, the content of its files."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str) -> str | None:
        if revision == "main":
            return list(self.commits)[-1] if self.commits else None
        return revision if revision in self.commits else None


class Hub(ThreadingHTTPServer):
    """Serves repositories; whoever has `TOKEN` may write, and read private ones."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.downloads: list[tuple[str, str]] = []  # repository and file

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = self.body()
        if self.path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories.setdefault(name, Repository(private))
            return self.answer({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        name, call = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main(?:\?.*)?", self.path).groups()
        if call == "preupload":
            files = [entry["path"] for entry in json.loads(body)["files"]]
            answers = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self.answer({"files": answers})
        return self.commit(name, [json.loads(line) for line in body.splitlines()])

    def commit(self, name, lines):
        repository = self.server.repositories[name]
        files = dict(repository.commits.get(repository.at("main"), {}))
        for line in lines:
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                assert line["key"] == "header"
        commit = hashlib.sha1(repr((len(repository.commits), sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit] = files
        self.answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    def do_GET(self):
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        download = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            name, kind, revision = api.groups()
        elif download:
            name, revision, file = download.groups()
        else:
            return self.refuse(404, "RepoNotFound")
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.refuse(401, "RepoNotFound")
        commit = repository.at(revision or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if api and kind == "tree":
            tree = [{"type": "file", "path": file, "oid": oid(files[file]), "size": len(files[file])} for file in files]
            return self.answer(tree)
        if api:
            about = {"id": name, "modelId": name, "sha": commit, "private": repository.private}
            return self.answer(about | {"siblings": [{"rfilename": file} for file in files]})
        if file not in files:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if self.command == "GET":
            self.server.downloads.append((name, file))
        self.send(200, files[file], {"X-Repo-Commit": commit, "ETag": f'"{oid(files[file])}"'})

    do_HEAD = do_GET

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, content):
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, reason, headers=()):
        self.send(status, b"{}", {"X-Error-Code": reason, "Content-Type": "application/json", **dict(headers)})

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def oid(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
