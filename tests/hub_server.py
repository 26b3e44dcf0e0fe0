"""A Hub in a thread: what the real `huggingface_hub` client needs to create, upload and download, over HTTP.

It checks tokens, takes small files with the commit and large ones by LFS, whole or in parts, commits all or nothing,
and fails where it is told to. It knows no Xet: clients set `HF_HUB_DISABLE_XET`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit


USER, TOKEN = "me", "hf_a_token_of_the_local_hub"
BRANCH = "main"

Files = dict[str, bytes]


@dataclass(frozen=True)
class Commit:
    """All files after a commit."""

    oid: str
    message: str
    files: Files


@dataclass
class Repo:
    """A repository; the client sees its last commit."""

    is_private: bool
    commits: list[Commit]

    @property
    def files(self) -> Files:
        return self.commits[-1].files


@dataclass
class Failure:
    """Answers some requests with an error: those that match, after the first `skip`, `times` of them."""

    method: str
    path: str
    status: int
    skip: int = 0
    times: int = 1

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path):
            return False
        self.skip -= 1
        if self.skip >= 0 or self.times == 0:
            return False
        self.times -= 1
        return True


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Hub:
    """What the server knows.

    Args:
        chunk_size: Bytes of a part of a large file; None takes large files whole.
    """

    url: str = ""
    chunk_size: int | None = None
    repos: dict[str, Repo] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by sha256
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, status
    lock: RLock = field(default_factory=RLock)

    def reset(self) -> None:
        """Forget all but the address."""
        self.__init__(self.url)

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.requests)

    def repo(self, name: str, is_known: bool) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.is_private and not is_known):
            raise Refusal(404 if is_known else 401, "Repository not found", "RepoNotFound")
        return repo

    def commit(self, name: str, lines: bytes) -> Commit:
        """Apply the lines of a commit to a copy, and publish it only when all is well."""
        repo = self.repos[name]
        files, message = dict(repo.files), ""
        for line in map(json.loads, lines.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                content = self.objects.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    raise Refusal(400, f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = content
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown line {key}")
        if not message:
            raise Refusal(400, "a commit needs a summary")
        repo.commits.append(Commit(sha1(f"{len(repo.commits)} {name}".encode()), message, files))
        return repo.commits[-1]


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()  # as git does


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data)


def is_large(path: str) -> bool:
    """What a new repository's `.gitattributes` would say."""
    return path.endswith((".safetensors", ".png", ".bin", ".pt", ".model"))


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"  # the client keeps connections open
    wbufsize = -1  # head and body in one packet, as the second would wait for an acknowledgement
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._read()
        try:
            with self.hub.lock:
                for failure in self.hub.failures:
                    if failure.strikes(self.command, path):
                        raise Refusal(failure.status, "told to fail")
                for method, pattern, answer in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if self.command in method.split() and match:
                        status, headers, content = answer(self, body, *match.groups())
                        break
                else:
                    raise Refusal(404, f"no route {self.command} {path}")
        except Refusal as refusal:
            status = refusal.status
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
            content = json.dumps({"error": str(refusal)}).encode()
        self.hub.requests.append((self.command, path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    @property
    def is_known(self) -> bool:
        """Whether the token, if any, is right."""
        header = self.headers.get("Authorization")
        if header not in {None, f"Bearer {TOKEN}"}:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return header is not None

    def writable(self, name: str) -> Repo:
        if not self.is_known:
            raise Refusal(401, "Invalid username or password.")
        return self.hub.repo(name, is_known=True)

    def readable(self, name: str, revision: str) -> Commit:
        commits = self.hub.repo(name, self.is_known).commits
        found = [commit for commit in commits if revision in {commit.oid, BRANCH}]
        if not found:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return found[-1]


Answer = tuple[int, dict[str, str], bytes]


def as_json(content: object, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def whoami(handler: Handler, body: bytes) -> Answer:
    if not handler.is_known:
        raise Refusal(401, "Invalid username or password.")
    return as_json({"type": "user", "name": USER, "orgs": []})


def create(handler: Handler, body: bytes) -> Answer:
    if not handler.is_known:
        raise Refusal(401, "Invalid username or password.")
    request = json.loads(body)
    owner = request["organization"] or USER
    if owner != USER:
        raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
    name = f"{owner}/{request['name']}"
    answer = {"url": f"{handler.hub.url}/{name}", "name": name}
    if name in handler.hub.repos:
        return as_json({**answer, "error": "You already created this model repo"}, 409)
    first = Commit(sha1(name.encode()), "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
    handler.hub.repos[name] = Repo(request.get("visibility") == "private", [first])
    return as_json(answer)


def validate_card(handler: Handler, body: bytes) -> Answer:
    if not json.loads(body)["content"].startswith("---\n"):
        return as_json({"warnings": [{"message": "empty or missing yaml metadata"}], "errors": []})
    return as_json({"warnings": [], "errors": []})


def preupload(handler: Handler, body: bytes, name: str, revision: str) -> Answer:
    files = handler.writable(name).files
    answers = []
    for file in json.loads(body)["files"]:
        path = file["path"]
        mode = "lfs" if is_large(path) else "regular"
        oid = None if path not in files else (sha256 if mode == "lfs" else git_oid)(files[path])
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return as_json({"files": answers})


def lfs_batch(handler: Handler, body: bytes, name: str) -> Answer:
    handler.writable(name)
    hub, objects = handler.hub, []
    for item in json.loads(body)["objects"]:
        oid, size = item["oid"], item["size"]
        actions: dict[str, Any] = {"verify": {"href": f"{hub.url}/{name}.git/info/lfs/verify"}}
        if hub.chunk_size is None:
            actions["upload"] = {"href": f"{hub.url}/lfs/{oid}"}
        else:
            numbers = range(1, -(-size // hub.chunk_size) + 1)
            parts = {f"{number:05d}": f"{hub.url}/lfs/{oid}/{number}" for number in numbers}
            header = {"chunk_size": str(hub.chunk_size), **parts}
            actions["upload"] = {"href": f"{hub.url}/lfs/{oid}/complete", "header": header}
        objects.append({"oid": oid, "size": size, **({} if oid in hub.objects else {"actions": actions})})
    return as_json({"transfer": "basic" if hub.chunk_size is None else "multipart", "objects": objects})


def put_object(handler: Handler, body: bytes, oid: str) -> Answer:
    if sha256(body) != oid:
        raise Refusal(400, "another content than announced")
    handler.hub.objects[oid] = body
    return 200, {}, b""


def put_part(handler: Handler, body: bytes, oid: str, number: str) -> Answer:
    handler.hub.parts.setdefault(oid, {})[int(number)] = body
    return 200, {"ETag": f'"{sha1(body)}"'}, b""


def complete(handler: Handler, body: bytes, oid: str) -> Answer:
    parts = handler.hub.parts[oid]
    listed = {part["partNumber"]: part["etag"] for part in json.loads(body)["parts"]}
    if listed != {number: f'"{sha1(part)}"' for number, part in parts.items()}:
        raise Refusal(400, "other parts than uploaded")
    return put_object(handler, b"".join(parts[number] for number in sorted(parts)), oid)


def verify(handler: Handler, body: bytes, name: str) -> Answer:
    handler.writable(name)
    item = json.loads(body)
    if len(handler.hub.objects.get(item["oid"], b"")) != item["size"]:
        raise Refusal(404, "no such object")
    return as_json({})


def commit(handler: Handler, body: bytes, name: str, revision: str) -> Answer:
    handler.writable(name)
    if revision != BRANCH:
        raise Refusal(404, "Invalid rev id", "RevisionNotFound")
    new = handler.hub.commit(name, body)
    return as_json({"success": True, "commitOid": new.oid, "commitUrl": f"{handler.hub.url}/{name}/commit/{new.oid}"})


def model_info(handler: Handler, body: bytes, name: str, revision: str | None = None) -> Answer:
    found = handler.readable(name, revision or BRANCH)
    private = handler.hub.repos[name].is_private
    siblings = [{"rfilename": path} for path in found.files]
    return as_json({"id": name, "sha": found.oid, "private": private, "tags": [], "siblings": siblings})


def tree(handler: Handler, body: bytes, name: str, revision: str, folder: str | None = None) -> Answer:
    files = handler.readable(name, revision).files
    paths = [path for path in files if path.startswith(folder or "")]
    if not paths:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    return as_json([{"type": "file", "path": path, "size": len(files[path]), "oid": "0"} for path in paths])


def resolve(handler: Handler, body: bytes, name: str, revision: str, path: str) -> Answer:
    found = handler.readable(name, revision)
    headers = {"X-Repo-Commit": found.oid}
    if path not in found.files:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    content = found.files[path]
    if not is_large(path):
        return 200, {**headers, "ETag": f'"{git_oid(content)}"'}, content
    linked = {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
    elsewhere = handler.hub.url.replace("127.0.0.1", "localhost")  # large files come from another host
    return 302, {**headers, **linked, "Location": f"{elsewhere}/cdn/{sha256(content)}"}, b""


def cdn(handler: Handler, body: bytes, oid: str) -> Answer:
    if "Authorization" in handler.headers:
        raise Refusal(400, "a token was sent to another host")
    return 200, {"ETag": f'"{oid}"'}, handler.hub.objects[oid]


_NAME, _REST = r"([^/]+/[^/]+)", r"(.+)"

#: Methods, path, and who answers.
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_card),
    ("POST", f"/api/models/{_NAME}/preupload/{_REST}", preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/lfs/([0-9a-f]+)", put_object),
    ("PUT", r"/lfs/([0-9a-f]+)/(\d+)", put_part),
    ("POST", "/lfs/([0-9a-f]+)/complete", complete),
    ("POST", rf"/{_NAME}\.git/info/lfs/verify", verify),
    ("POST", f"/api/models/{_NAME}/commit/{_REST}", commit),
    ("GET", f"/api/models/{_NAME}", model_info),
    ("GET", f"/api/models/{_NAME}/revision/{_REST}", model_info),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)(?:/{_REST})?", tree),
    ("GET HEAD", f"/{_NAME}/resolve/([^/]+)/{_REST}", resolve),
    ("GET HEAD", "/cdn/([0-9a-f]+)", cdn),
]


@contextmanager
def serve() -> Generator[Hub]:
    """Run a Hub at a free port of this machine until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True  # connections that the client keeps open do not hold the test up
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
