"""A server that speaks the Hugging Face Hub's API as far as p2w uses it: repositories, commits, large files, downloads."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aSecretThatNobodyMaySee"
LARGE = 1000  # bytes from which a file goes up as a large one, in a request of its own


@dataclass
class Hub:
    """What the server holds: of each repository its branches and commits, and what it was asked."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Repository -> the status and the X-Error-Code that every question about it is answered with."""
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit; its hash."""
        before = self.branches.setdefault(repo, {}).get(branch, "")
        whole = {**self.commits.get((repo, before), {}), **files}
        said = before.encode() + b"".join(name.encode() + data for name, data in sorted(whole.items()))
        oid = hashlib.sha1(said).hexdigest()
        self.branches[repo][branch], self.commits[repo, oid] = oid, whole
        return oid

    def find(self, repo: str, revision: str) -> str | None:
        """The commit of a branch, or of a commit's own hash."""
        oid = self.branches.get(repo, {}).get(revision, revision)
        return oid if (repo, oid) in self.commits else None


class Handler(BaseHTTPRequestHandler):
    """Answers as huggingface.co does; needs the token for whatever changes something, and for private repositories."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(data))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if self.missing(repo):
            return None
        oid = self.hub.find(repo, revision)
        if oid is None:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        data = self.hub.commits[repo, oid].get(name)
        if data is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.reply(200, data, ETag=etag, X_Repo_Commit=oid, Accept_Ranges="bytes")

    def missing(self, repo: str) -> bool:
        """Whether there is no such repository for whoever asks; then it is answered."""
        if repo in self.hub.refused:
            status, code = self.hub.refused[repo]
            self.reply(status, {"error": "no"}, **({"X_Error_Code": code} if code else {}))
            return True
        hidden = self.hub.private.get(repo) and not self.allowed
        if repo in self.hub.branches and not hidden:
            return False
        self.reply(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return True

    def info(self, repo: str, revision: str) -> None:
        if self.missing(repo):
            return
        oid = self.hub.find(repo, revision)
        if oid is None:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        names = [{"rfilename": name} for name in self.hub.commits[repo, oid]]
        return self.reply(200, {"id": repo, "sha": oid, "siblings": names, "private": False, "tags": []})

    def do_PUT(self) -> None:
        self.hub.asked.append(f"PUT {self.path}")
        data = self.body()
        self.hub.large[hashlib.sha256(data).hexdigest()] = data
        self.reply(200)

    def do_POST(self) -> None:  # noqa: PLR0911  (an answer each)
        path, data = unquote(urlsplit(self.path).path), self.body()
        self.hub.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if not self.allowed:
            return self.reply(401, {"error": "Invalid credentials"})
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(data))
        if path == "/api/repos/create":
            told = json.loads(data)
            repo = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
            if repo in self.hub.branches:
                return self.reply(
                    409, {"error": "You already created this model repo", "url": f"{self.hub.address}/{repo}"}
                )
            self.hub.private[repo] = bool(told.get("private") or told.get("visibility") == "private")
            self.hub.commit(repo, {".gitattributes": b""})
            return self.reply(200, {"url": f"{self.hub.address}/{repo}"})
        repo, action, branch = "/".join(path.split("/")[3:5]), path.split("/")[5], path.split("/")[6]
        if action == "branch":
            self.hub.branches[repo].setdefault(branch, self.hub.branches[repo]["main"])
            return self.reply(200)
        if action == "preupload":
            files = json.loads(data)["files"]
            modes = ["lfs" if one["size"] >= LARGE else "regular" for one in files]
            answers = [
                {"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for one, mode in zip(files, modes, strict=True)
            ]
            return self.reply(200, {"files": answers})
        return self.take_commit(repo, branch, [json.loads(line) for line in data.splitlines() if line])

    def batch(self, told: dict) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/upload/{one['oid']}"}}}
            for one in told["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def take_commit(self, repo: str, branch: str, lines: list[dict]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = self.hub.commit(repo, files, branch)
        self.reply(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{oid}", "commitOid": oid})


@contextmanager
def hub_server():
    """A running server and what it holds."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
