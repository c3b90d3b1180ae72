"""A Hub on the loopback interface: the few requests that downloading a repository takes."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """The files at each revision, and the error that reading one answers: (status, X-Error-Code)."""

    revisions: dict[str, Files]
    on_info: tuple[int, str] | None = None
    on_file: tuple[int, str] | None = None

    def commit(self, revision: str) -> str:
        """The commit a revision stands for: 40 hex digits."""
        return hashlib.sha1(revision.encode()).hexdigest()

    def files(self, revision: str) -> Files | None:
        """The files at a branch or commit; None where there is no such one."""
        return next((f for r, f in self.revisions.items() if revision in (r, self.commit(r))), None)


@dataclass
class HubServer:
    """Serves the repositories while its context lasts; ``requests`` lists what was asked for."""

    repositories: dict[str, Repository]
    requests: list[str] = field(default_factory=list)

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
        path = unquote(urlsplit(self.path).path)
        self.server_of.requests.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _api(self, repo_id: str, rest: list[str]) -> None:
        repository = self.server_of.repositories.get(repo_id)
        if repository is None:
            return self._error(401, "RepoNotFound")  # what the Hub says to those not logged in
        if repository.on_info:
            return self._error(*repository.on_info)
        kind, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        files = repository.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound")
        if kind == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                for name, data in files.items()
            ]
            return self._answer(json.dumps(entries).encode())
        siblings = [{"rfilename": name} for name in files]
        info = {"id": repo_id, "sha": _commit_of(repository, revision), "siblings": siblings}
        return self._answer(json.dumps(info).encode())

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.server_of.repositories[repo_id]
        files = repository.files(revision)
        if repository.on_file:
            return self._error(*repository.on_file)
        if files is None or name not in files:
            return self._error(404, "EntryNotFound")
        data = files[name]
        return self._answer(
            data, {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": _commit_of(repository, revision)}
        )

    def _answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(b"", {"X-Error-Code": code}, status)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the test's stderr."""


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _commit_of(repository: Repository, revision: str) -> str:
    return revision if len(revision) == 40 else repository.commit(revision)
