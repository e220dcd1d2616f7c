"""A stand-in for the Hugging Face Hub: real HTTP on 127.0.0.1, repositories in memory, faults on request.

It handles the requests that `huggingface_hub` 2 and Transformers 5 send when pushing and loading a model, and
responds like the Hub, but supports neither Xet nor multipart uploads. Large files are sent with the commit or, with
`lfs=True` (for which the client needs `HF_HUB_DISABLE_XET`), through the LFS protocol.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"
_YAML = re.compile(r"^---\n(.*?)\n---\n", re.DOTALL)


@dataclass
class Fault:
    """A failure of the next `times` requests with this method and a matching path, after `skip` of them.

    `status` is returned in place of the real response; None drops the connection in the middle of the request's body.
    """

    method: str
    path: str
    status: int | None
    times: int = 1
    message: str = ""
    skip: int = 0


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by name, by commit
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pull_requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def open_pull_request(self) -> str:
        self.pull_requests += 1
        name = f"refs/pr/{self.pull_requests}"
        self.branches[name] = self.branches["main"]
        return name

    def head(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.head(revision)]


class FakeHub:
    """Use as a context manager; `url` is its address."""

    def __init__(self, lfs: bool = False):
        self.lfs = lfs
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # fully uploaded LFS objects, by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"", **(files or {})}, "initial commit")
        return repo

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that applies to this request, which consumes it."""
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def upload_mode(self, name: str) -> str:
        return "lfs" if self.lfs and name.endswith(".safetensors") else "regular"


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length", 0))
        fault = self.hub.fault(self.command, path)
        if fault is not None and fault.status is None:
            self.rfile.read(length // 2)
            self.connection.close()
            self.close_connection = True
            return
        body = self.read_body(length)
        try:
            if fault is not None:
                raise _Refusal(fault.status, fault.message)
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    given = {key: value for key, value in match.groupdict().items() if value is not None}
                    answer(self, body, **given)
                    return
            raise _Refusal(404, f"not a path of this stand-in: {self.command} {path}")
        except _Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self.answer({"error": str(refusal)}, refusal.status, headers)

    def read_body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":  # a body would be read as the next response
            self.wfile.write(raw)

    # -------------------------------------------------------------------------------------- authentication and lookup

    def require_write(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == READ_TOKEN:
            raise _Refusal(403, "You don't have the rights to write to this namespace")
        if token != WRITE_TOKEN:
            raise _Refusal(401, "Invalid credentials in Authorization header")

    def repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[name]

    def head(self, repo: Repo, revision: str) -> str:
        oid = repo.head(revision)
        if oid is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # ----------------------------------------------------------------------------------------------------- responses

    def create_repo(self, body: bytes) -> None:
        self.require_write()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            raise _Refusal(409, "You already created this model repo")
        self.hub.create(name, asked.get("visibility") == "private" or asked.get("private", False))
        self.answer({"url": f"{self.hub.url}/{name}"})

    def validate_yaml(self, body: bytes) -> None:
        match = _YAML.match(json.loads(body)["content"])
        metadata = yaml.safe_load(match[1]) if match else {}
        problems = [
            f"{name} must be a string"
            for name in ("license", "pipeline_tag")
            if not isinstance(metadata.get(name, ""), str)
        ]
        self.answer({"errors": [{"message": text} for text in problems], "warnings": []}, 400 if problems else 200)

    def model_info(self, body: bytes, name: str, revision: str = "main") -> None:
        repo = self.repo(name)
        oid = self.head(repo, revision)
        files = repo.commits[oid]
        match = _YAML.match(files.get("README.md", b"").decode())
        card = yaml.safe_load(match[1]) if match else None
        siblings = [{"rfilename": file} for file in files]
        record = {"_id": name, "id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
        self.answer({**record, "cardData": card})

    def create_branch(self, body: bytes, name: str, branch: str) -> None:
        self.require_write()
        repo = self.repo(name)
        repo.branches[branch] = repo.branches["main"]
        self.answer({})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self.require_write()
        repo = self.repo(name)
        files = repo.commits[self.head(repo, revision)]
        answers = []
        for asked in json.loads(body)["files"]:
            path, content = asked["path"], files.get(asked["path"])
            mode = self.hub.upload_mode(path)
            oid = None if content is None else _oid(content, mode)
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        self.require_write()
        repo = self.repo(name)
        head = self.head(repo, revision)
        files, message = dict(repo.commits[head]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise _Refusal(412, "A commit has happened since")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Refusal(400, f"there is no LFS object {value['oid']}")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(400, f"unknown operation {line['key']}")
        answer = {"success": True}
        if "create_pr=1" in urlsplit(self.path).query:
            revision = repo.open_pull_request()
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{repo.pull_requests}"
        oid = repo.commit(revision, files, message)
        self.answer({**answer, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def tree(self, body: bytes, name: str, revision: str, folder: str = "") -> None:
        repo = self.repo(name)
        files = repo.commits[self.head(repo, revision)]
        inside = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        self.answer(
            [{"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in inside.items()]
        )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        oid = self.head(repo, revision)
        content = repo.commits[oid].get(path)
        if content is None:
            raise _Refusal(404, f"{path} does not exist", "EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, headers={"ETag": etag, "X-Repo-Commit": oid, "Accept-Ranges": "none"})

    def lfs_batch(self, body: bytes, name: str) -> None:
        self.require_write()
        objects = []
        for asked in json.loads(body)["objects"]:
            known = asked["oid"] in self.hub.blobs
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append({**asked, **({} if known else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "the contents do not have this SHA-256")
        self.hub.blobs[oid] = body
        self.answer(b"")

    def open_pull_request(self, body: bytes, name: str) -> None:
        self.require_write()
        repo = self.repo(name)
        repo.open_pull_request()
        self.answer({"num": repo.pull_requests})

    def pull_request(self, body: bytes, name: str, number: str) -> None:
        self.answer(
            {
                "title": "title",
                "num": int(number),
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "draft",
                "repo": {"name": name, "type": "model"},
                "isPullRequest": True,
                "events": [],
                "filesWithConflicts": [],
                "changes": {"base": "refs/heads/main"},
                "diff": "",
            }
        )


def _oid(content: bytes, mode: str) -> str:
    """The Hub's id for the contents of a file: SHA-256 in LFS, otherwise the git blob id."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"/api/models/{_NAME}", _Handler.model_info),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", _Handler.model_info),
    ("POST", f"/api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.tree),
    ("POST", f"/api/models/{_NAME}/discussions", _Handler.open_pull_request),
    ("GET", rf"/api/models/{_NAME}/discussions/(?P<number>\d+)", _Handler.pull_request),
    ("GET HEAD", f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_put),
]
