"""A stand-in for the Hub: it speaks the HTTP calls of `huggingface_hub` and keeps the files it is sent."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

USER = "someone"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png")


class Hub:
    """Repositories as directories below `root`; every request is one line of `requests.log`."""

    def __init__(self, root: Path):
        self.root = root
        self.objects: dict[str, bytes] = {}
        self.commits: list[dict] = []

    def repo(self, name: str) -> Path:
        return self.root / "repos" / name

    def commit(self, name: str, lines: list[dict]) -> str:
        header = next(line["value"] for line in lines if line["key"] == "header")
        changed = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.objects[value["oid"]]
            else:
                continue
            path = self.repo(name) / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            changed.append(value["path"])
        self.commits.append({"repo": name, "message": header["summary"], "files": changed})
        (self.root / "commits.json").write_text(json.dumps(self.commits))
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *args):
        with (self.hub.root / "requests.log").open("a") as log:
            log.write(f"{self.command} {self.path}\n")

    def answer(self, value: object = None, status: int = 200, body: bytes | None = None, **headers: str):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, header in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(self.hub.repo(match[1]) / match[3])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            repo = self.hub.repo(match[1])
            names = sorted(str(file.relative_to(repo)) for file in repo.rglob("*") if file.is_file())
            if repo.is_dir():
                info = {"id": match[1], "modelId": match[1], "sha": "0" * 40, "private": False, "tags": []}
                return self.answer(info | {"siblings": [{"rfilename": name} for name in names]})
            return self.missing("RepoNotFound")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            repo = self.hub.repo(match[1])
            files = [file for file in sorted((repo / match[3]).rglob("*")) if file.is_file()]
            return self.answer(
                [
                    {"type": "file", "path": str(f.relative_to(repo)), "size": f.stat().st_size, "oid": "0" * 40}
                    for f in files
                ]
            )
        return self.missing("EntryNotFound")

    def resolve(self, file: Path):
        if not file.is_file():
            return self.missing("EntryNotFound")
        content = file.read_bytes()
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(body=content, ETag=etag, X_Repo_Commit="0" * 40, Accept_Ranges="none")

    def missing(self, code: str):
        return self.answer({"error": code}, 404, X_Error_Code=code)

    def do_POST(self):
        path, data = self.path.partition("?")[0], self.body()
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            self.hub.repo(name).mkdir(parents=True, exist_ok=True)
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        if path == "/api/validate-yaml":
            (self.hub.root / "validated.json").write_bytes(data)
            return self.answer({"errors": [], "warnings": []})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(data)["files"]
            ]
            return self.answer({"files": files})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {
                    **{key: thing[key] for key in ("oid", "size")},
                    "actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{thing['oid']}", "header": {}}},
                }
                for thing in json.loads(data)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            oid = self.hub.commit(match[1], [json.loads(line) for line in data.splitlines()])
            url = f"http://{self.headers['Host']}/{match[1]}/commit/{oid}"
            return self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
        return self.missing("EntryNotFound")

    def do_PUT(self):
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", self.path):
            content = self.body()
            assert hashlib.sha256(content).hexdigest() == match[1]
            self.hub.objects[match[1]] = content
            return self.answer({})
        return self.missing("EntryNotFound")


def serve(root: Path) -> ThreadingHTTPServer:
    """A server that listens; `serve_forever` answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(root)
    return server
