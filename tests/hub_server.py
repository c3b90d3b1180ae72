"""A Hugging Face Hub on the loopback interface, with the requests for downloading and uploading a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]

PIECE = 16_384  # bytes of a file that are sent at once


@dataclass
class Repository:
    """A repository of the Hub, with the errors that its requests get.

    Attributes:
        revisions: The files of each branch.
        on_info: Status and X-Error-Code that answer every request for information; None for no error.
        on_lists: Statuses that answer the next requests for the list of files.
        on_file: Status and X-Error-Code that answer every request for a file; None for no error.
        troubles: Errors of single files. Each one affects one of the file's next downloads. It is an HTTP status, or a
            number of bytes after which the connection of the next longer download is closed.
        damaged: Files of which one byte is wrong in the next downloads, with the number of these downloads.
        claimed: Sizes of files that the list of files gives instead of the true ones.
        xet: The name of a file's content in the storage that ``HubServer.xet_endpoint`` names.
    """

    revisions: dict[str, Files] = field(default_factory=dict)
    on_info: tuple[int, str] | None = None
    on_lists: list[int] = field(default_factory=list)
    on_file: tuple[int, str] | None = None
    troubles: dict[str, list[HTTPStatus | int]] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    xet: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> str:
        """Return the commit of a branch, 40 hex digits, which depends on the contents of its files."""
        contents = "".join(f"{name} {_digest(name, data)}" for name, data in self.revisions[revision].items())
        return hashlib.sha1(f"{revision} {contents}".encode()).hexdigest()

    def files(self, revision: str) -> Files | None:
        """Return the files of a branch or commit, or None if it does not exist."""
        if revision in self.revisions:
            return self.revisions[revision]
        return next((files for name, files in self.revisions.items() if revision == self.commit(name)), None)


@dataclass
class HubServer:
    """A server of repositories, which runs within its context.

    Attributes:
        repositories: The repositories by their ids.
        on_write: Status and X-Error-Code that answer uploads to a path.
        requests: Paths of all requests so far.
        downloads: Name of each file whose content was requested, with the Range header.
        stalled: Files of which only the first half is sent, until the client goes; the event says that one asked.
        stored: Large files that were uploaded, by their SHA-256 digests.
        rate: Bytes per second of each download of a file, or None.
        sent: Number of bytes of each file that were sent so far, over all downloads.
        knows_ranges: Whether a part of a file is sent when a part was asked for.
        xet_endpoint: Address of the Xet storage.
    """

    repositories: dict[str, Repository]
    on_write: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    downloads: list[tuple[str, str | None]] = field(default_factory=list)
    stalled: dict[str, threading.Event] = field(default_factory=dict)
    stored: Files = field(default_factory=dict)
    rate: int | None = None
    sent: Counter[str] = field(default_factory=Counter)
    knows_ranges: bool = True
    xet_endpoint: str = ""

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._path()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]  # a branch may have slashes
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers["Content-Length"]))
        parts = path.strip("/").split("/")
        if "Authorization" not in self.headers:
            self._error(401, "")
        elif error := self.server_of.on_write.get(path):
            self._error(*error)
        elif path == "/api/validate-yaml":
            self._json({})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"objects": [self._upload_of(item) for item in json.loads(body)["objects"]]})
        elif parts[4:5] == ["preupload"]:
            modes = {True: "lfs", False: "regular"}
            self._json({"files": [
                {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")],
                 "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        elif parts[4:5] == ["commit"]:
            self._commit("/".join(parts[2:4]), parts[5], [json.loads(line) for line in body.splitlines()])
        else:
            self._error(404, "")

    def do_PUT(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers["Content-Length"]))
        if error := self.server_of.on_write.get(path):
            return self._error(*error)
        self.server_of.stored[hashlib.sha256(body).hexdigest()] = body
        return self._answer(b"")

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server_of.requests.append(path)
        return path

    def _create(self, wanted: dict[str, str]) -> None:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        known = repo_id in self.server_of.repositories
        self.server_of.repositories.setdefault(repo_id, Repository({"main": {}}))
        self._json({"url": f"{self.server_of.url}/{repo_id}"}, 409 if known else 200)

    def _upload_of(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the answer that tells the client where to upload a large file."""
        return {**item, "actions": {"upload": {"href": f"{self.server_of.url}/put/{item['oid']}"}}}

    def _commit(self, repo_id: str, revision: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server_of.repositories[repo_id]
        files = repository.revisions[revision]
        for value in (line["value"] for line in lines if line["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            files[value["path"]] = self.server_of.stored[value["oid"]]
        commit = repository.commit(revision)
        self._json({"commitUrl": f"{self.server_of.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    def _api(self, repo_id: str, rest: list[str]) -> None:
        repository = self.server_of.repositories.get(repo_id)
        if repository is None:
            return self._error(401, "RepoNotFound")  # the Hub's answer without a login
        if repository.on_info:
            return self._error(*repository.on_info)
        kind, revision = rest[:2] if rest else ("revision", "main")
        files = repository.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound")
        if kind == "tree":
            status = repository.on_lists.pop(0) if repository.on_lists else 200
            if status != 200:
                return self._error(status, "")
            return self._json([_entry(repository, name, data) for name, data in files.items()])
        if kind == "xet-read-token":
            storage = {"X-Xet-Cas-Url": self.server_of.xet_endpoint, "X-Xet-Access-Token": "token",
                       "X-Xet-Token-Expiration": str(int(time.time()) + 3600)}  # fmt: skip
            token = {"casUrl": self.server_of.xet_endpoint, "accessToken": "token", "exp": int(time.time()) + 3600}
            return self._answer(json.dumps(token).encode(), storage)
        siblings = [{"rfilename": name} for name in files]
        return self._json({"id": repo_id, "sha": _commit_of(repository, revision), "siblings": siblings})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.server_of.repositories[repo_id]
        files = repository.files(revision)
        if repository.on_file:
            return self._error(*repository.on_file)
        if files is None or name not in files:
            return self._error(404, "EntryNotFound")
        data = files[name]
        headers = {"ETag": f'"{_digest(name, data)}"', "X-Repo-Commit": _commit_of(repository, revision)}
        if self.command == "HEAD":
            return self._answer(data, headers)
        asked = self.headers["Range"]
        self.server_of.downloads.append((name, asked))
        status = 200
        if repository.damaged.get(name):
            repository.damaged[name] -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        if found and self.server_of.knows_ranges:
            start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        if name in self.server_of.stalled:
            return self._stall(data, headers, status, self.server_of.stalled[name])
        trouble = next(iter(repository.troubles.get(name, [])), len(data))
        if isinstance(trouble, HTTPStatus) or trouble < len(data):
            repository.troubles[name].pop(0)
        if isinstance(trouble, HTTPStatus):
            return self._error(trouble, "")
        return self._answer(data, headers, status, breaks_after=trouble, counted_as=name)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def _answer(
        self, body: bytes, headers: dict[str, str] | None = None, status: int = 200, breaks_after: int = sys.maxsize,
        counted_as: str = "",
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send(body[:breaks_after], counted_as)
        if breaks_after < len(body):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, body: bytes, counted_as: str) -> None:
        """Send a body, a file's at the Hub's rate and little by little, so that hardly anything is under way."""
        if not counted_as:
            self.wfile.write(body)
            return
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
        with suppress(OSError):  # the client has gone
            for start in range(0, len(body), PIECE):
                piece = body[start : start + PIECE]
                self.wfile.write(piece)
                self.server_of.sent[counted_as] += len(piece)
                if self.server_of.rate:
                    time.sleep(len(piece) / self.server_of.rate)

    def _stall(self, body: bytes, headers: dict[str, str], status: int, asked: threading.Event) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        asked.set()
        with suppress(OSError):
            self.connection.recv(1)  # returns when the client goes
        self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self._answer(b"", {"X-Error-Code": code}, status)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors") or name == "tokenizer.json"


def _digest(name: str, data: bytes) -> str:
    """Return the checksum that the Hub gives a file: SHA-256 of a large one, git's SHA-1 of a small one."""
    content = hashlib.sha256(data) if _is_large(name) else hashlib.sha1(b"blob %d\0" % len(data) + data)
    return content.hexdigest()


def _entry(repository: Repository, name: str, data: bytes) -> dict[str, Any]:
    """Return what the list of files says about a file."""
    size = repository.claimed.get(name, len(data))
    entry = {"type": "file", "path": name, "size": size, "oid": _digest(name, data)}
    if _is_large(name):
        entry["lfs"] = {"oid": _digest(name, data), "size": size, "pointerSize": 134}
    if name in repository.xet:
        entry["xetHash"] = repository.xet[name]
    return entry


def _commit_of(repository: Repository, revision: str) -> str:
    return revision if len(revision) == 40 else repository.commit(revision)
