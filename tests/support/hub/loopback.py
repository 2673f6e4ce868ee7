"""A Hub on 127.0.0.1 that implements as much of the Hub's protocol as huggingface_hub 2.4.0 uses.

A test double with two origins, the Hub and its storage, over a bare git repository for each repository (``store.py``).
What the client sends and expects was read in its source (``_commit_api.py``, ``lfs.py``, ``file_download.py``,
``hf_api.py``, ``utils/_http.py``, ``utils/_xet.py``). Differences from the real Hub:

- large files are those that end in .safetensors or .bin, whatever .gitattributes says;
- with ``xet=None`` a large file has a ``xetHash`` in listings, so that the client copies it between repositories, but
  downloads and uploads use plain LFS, in one part. With a `XetStore` (``xet.py``), files that hf_xet has put into it
  are offered through xet too;
- the name of a token, not its scope, says what it allows; there are no pages, no rate limits and no regions;
- redirects have a fake ``?signature=``, which is not checked.

The list ``rules`` makes requests fail: see `when` in ``answers.py``. With ``patience`` the storage closes the
connection after that many bytes of an upload.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub.answers import Answer, Listener, Request, no, yes
from tests.support.hub.store import LARGE, Blob, Repo
from tests.support.hub.xet import XetStore

WRITER, READER = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader"

Parts = dict[str, str]
"""The named parts of a path or a query."""


class Hub:
    """The server: start it with `running`.

    Args:
        folder: The folder for its repositories.
        xet: A store for hf_xet.
    """

    def __init__(self, folder: Path, xet: XetStore | None = None) -> None:
        self.folder = folder
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.rules: list[Callable[[Request, Callable[[], Answer]], Answer | None]] = []
        self.xet = xet
        self.copies = True
        self.patience: int | None = None
        self._lock = threading.RLock()
        self.origin = Listener(self._serve)
        self.storage = Listener(self._store, lambda: self.patience)

    @property
    def url(self) -> str:
        return self.origin.url

    @contextmanager
    def running(self) -> Iterator[Hub]:
        with self.origin.running(), self.storage.running():
            yield self

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> str:
        """Add a commit to a repository, without the client, and create the repository if needed; returns the commit."""
        if name not in self.repos:
            self.repos[name] = Repo(self.folder / f"{name}.git", private=private, gated=gated)
        repo = self.repos[name]
        parent = repo.branches.get("main")
        changes = {
            path: repo.pointer_object(repo.keep(data)) if path.endswith(LARGE) else repo.small_object(data)
            for path, data in files.items()
        }
        sha = repo.commit(changes, parent, "made by hand")
        assert repo.point("refs/heads/main", sha, parent)
        return sha

    def seen(self, pattern: str) -> list[Request]:
        """Return the requests whose "METHOD path" matches a pattern."""
        return [request for request in self.log if re.search(pattern, f"{request.method} {request.path}")]

    def moved(self) -> int:
        """Return the size of all bodies, in both directions."""
        return sum(request.sent + len(request.body) for request in self.log)

    def _apply_rules(self, request: Request, route: Callable[[Request], Answer]) -> Answer:
        self.log.append(request)

        def go() -> Answer:
            with self._lock:
                return route(request)

        for rule in list(self.rules):
            answer = rule(request, go)
            if answer is not None:
                return answer
        return go()

    def _serve(self, request: Request) -> Answer:
        return self._apply_rules(request, self._route)

    def _store(self, request: Request) -> Answer:
        return self._apply_rules(request, self._storage)

    def _storage(self, request: Request) -> Answer:
        """The second origin: it gets signed URLs and never a token."""
        _, owner, name, oid = urlsplit(request.path).path.split("/")
        repo = self.repos[f"{owner}/{name}"]
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != oid:
                return no(400, "the content does not match its hash")
            repo.keep(request.body)
            return yes({})
        return request.slice(repo.large(oid).read_bytes())

    def _route(self, request: Request) -> Answer:
        parts = urlsplit(request.path)
        path, query = parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()}
        if path == "/api/validate-yaml":
            return yes({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(request)
        for pattern, route in self._ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                name = f"{match['owner']}/{match['name']}"
                repo = self.repos.get(name)
                if repo is None or (repo.private and request.token not in (WRITER, READER)):
                    return no(404 if request.token else 401, "Repository not found", "RepoNotFound")
                write = request.method == "POST" and "paths-info" not in path
                if write and request.token != WRITER:
                    return no(403, "you have read access only")
                rest = {k: unquote(v) for k, v in match.groupdict().items() if v and k not in ("owner", "name")}
                return route(self, repo, name, request, rest, query)
        return no(404, f"no such route: {path}")

    def _create(self, request: Request) -> Answer:
        body = json.loads(request.body)
        name = f"{body.get('organization') or 'team'}/{body['name']}"
        if request.token != WRITER:
            return no(403 if request.token else 401, f"you may not create {name}")
        if name in self.repos:
            return no(409, "You already created this model repo", url=f"{self.url}/{name}")
        self.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=body.get("visibility") == "private")
        return yes({"url": f"{self.url}/{name}", "name": name})

    def _info(self, repo: Repo, name: str, request: Request, rest: Parts, query: Parts) -> Answer:
        sha = repo.find(rest.get("rev", "main"))
        if sha is None:
            return no(404, "Invalid rev id", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in repo.tree(sha)]
        return yes({"id": name, "sha": sha, "private": repo.private, "gated": repo.gated, "siblings": siblings})

    def _item(self, path: str, blob: Blob) -> dict[str, Any]:
        item: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_oid}
        if blob.sha256 is not None:
            item["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
            if self.copies:
                item["xetHash"] = (self.xet and self.xet.hash_of(blob.sha256)) or blob.sha256
        return item

    def _list(self, repo: Repo, name: str, request: Request, rest: Parts, query: Parts) -> Answer:
        sha = repo.find(rest["rev"])
        if sha is None:
            return no(404, "Invalid rev id", "RevisionNotFound")
        files = repo.tree(sha)
        if "paths-info" in request.path:
            asked = parse_qs(request.body.decode()).get("paths", [])
            return yes([self._item(path, files[path]) for path in asked if path in files])
        deep = query.get("recursive") in ("1", "true", "True")
        folders = sorted({path.split("/")[0] for path in files if "/" in path})
        items = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders]
        return yes(items + [self._item(path, blob) for path, blob in files.items() if deep or "/" not in path])

    def _refs(self, repo: Repo, name: str, request: Request, rest: Parts, query: Parts) -> Answer:
        def refs(kind: str, found: dict[Any, str]) -> list[dict[str, str]]:
            return [{"name": str(n), "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in found.items()]

        return yes(
            {
                "branches": refs("heads", repo.branches),
                "tags": refs("tags", repo.tags),
                "converts": [],
                "pullRequests": refs("pr", repo.requests),
            }
        )

    def _point(self, repo: Repo, name: str, request: Request, rest: Parts, query: Parts) -> Answer:
        body = json.loads(request.body or b"{}")
        if "/tag/" in request.path:
            ref, start = f"refs/tags/{body['tag']}", rest["rev"]
        else:
            ref, start = f"refs/heads/{rest['rev']}", body.get("startingPoint", "main")
        sha = repo.find(start)
        if sha is None:
            return no(404, "Invalid rev id", "RevisionNotFound")
        return yes({}) if repo.point(ref, sha, None) else no(409, "Reference already exists")

    def _preupload(
        self, repo: Repo, name: str, request: Request, rest: dict[str, str], query: dict[str, str]
    ) -> Answer:
        sha = repo.find(rest["rev"])
        if sha is None:
            return no(404, "Invalid rev id", "RevisionNotFound")
        answers = []
        for file in json.loads(request.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            blob = repo.tree(sha).get(file["path"])
            if blob is not None:
                answer["oid"] = blob.sha256 or blob.git_oid
            answers.append(answer)
        return yes({"files": answers})

    def _batch(self, repo: Repo, name: str, request: Request, rest: Parts, query: Parts) -> Answer:
        objects = []
        for item in json.loads(request.body)["objects"]:
            if not repo.large(item["oid"]).exists():
                href = f"{self.storage.url}/{name}/{item['oid']}?signature=secretsecret"
                item = {**item, "actions": {"upload": {"href": href}, "verify": {"href": f"{self.url}/{name}/verify"}}}
            objects.append(item)
        return yes({"objects": objects})

    def _verify(self, repo: Repo, name: str, request: Request, rest: Parts, query: Parts) -> Answer:
        return yes({}) if repo.large(json.loads(request.body)["oid"]).exists() else no(404, "no such object")

    def _duplicate(
        self, repo: Repo, name: str, request: Request, rest: dict[str, str], query: dict[str, str]
    ) -> Answer:
        body = json.loads(request.body)
        target = self.repos[body["target"]["name"]]
        for file in body["files"]:
            target.keep(repo.large(file["sha256"]).read_bytes())
        return yes({"success": True, "failed": []})

    def _commit(self, repo: Repo, name: str, request: Request, rest: Parts, query: Parts) -> Answer:
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        head = repo.branches.get(rest["rev"])
        if head is None:
            return no(404, "Invalid rev id", "RevisionNotFound")
        wants_request = query.get("create_pr") == "1"
        parent = head if wants_request else header.get("parentCommit") or head
        changes = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = repo.small_object(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not repo.large(value["oid"]).exists() and self.xet is not None:
                    self.xet.bring(value["oid"], repo)
                if not repo.large(value["oid"]).exists():
                    return no(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                changes[value["path"]] = repo.pointer_object(value["oid"])
            else:
                return no(400, f"not supported: {line['key']}")
        sha = repo.commit(changes, head, header["summary"])
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"}
        if wants_request:
            number = len(repo.requests) + 1
            assert repo.point(f"refs/pr/{number}", sha, None)
            return yes({**answer, "pullRequestUrl": f"{self.url}/{name}/discussions/{number}"})
        if not repo.point(f"refs/heads/{rest['rev']}", sha, parent):
            return no(412, "A commit has happened since. Please refresh and try again.")
        return yes(answer)

    def _xet_token(self, repo: Repo, name: str, request: Request, rest: Parts, query: Parts) -> Answer:
        """Return a token for the content store: hf_xet reads it from the body, the client from the headers."""
        if self.xet is None:
            return no(404, "no xet here")
        if rest["kind"] == "write" and request.token != WRITER:
            return no(403, "you have read access only")
        until = int(time.time()) + 3600
        return yes({"casUrl": self.xet.url, "exp": until, "accessToken": "xet"}).having(
            {"X-Xet-Cas-Url": self.xet.url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
        )

    def _resolve(self, repo: Repo, name: str, request: Request, rest: Parts, query: Parts) -> Answer:
        if repo.gated and request.token != WRITER:
            return no(403 if request.token else 401, "Access to this model is restricted", "GatedRepo")
        sha = repo.find(rest["rev"])
        if sha is None:
            return no(404, "Invalid rev id", "RevisionNotFound")
        blob = repo.tree(sha).get(rest["path"])
        if blob is None:
            return no(404, "Entry not found", "EntryNotFound").having({"X-Repo-Commit": sha})
        if blob.sha256 is None:
            return request.slice(repo.read(blob)).having({"X-Repo-Commit": sha, "ETag": f'"{blob.git_oid}"'})
        headers = {
            "X-Repo-Commit": sha,
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(blob.size),
            "Location": f"{self.storage.url}/{name}/{blob.sha256}?signature=secretsecret",
        }
        stored = self.xet and self.xet.hash_of(blob.sha256)
        if stored:
            auth = f"{self.url}/api/models/{name}/xet-read-token/{sha}"
            headers.update({"X-Xet-Hash": stored, "Link": f'<{auth}>; rel="xet-auth"'})
        return Answer(302, b"", headers)

    _API = r"/api/models/(?P<owner>[^/]+)/(?P<name>[^/]+)"
    _PAGE = r"/(?P<owner>[^/]+)/(?P<name>[^/]+?)"
    _ROUTES = (
        (rf"{_API}(/revision/(?P<rev>[^/]+))?", _info),
        (rf"{_API}/(tree|paths-info)/(?P<rev>[^/]+)", _list),
        (rf"{_API}/refs", _refs),
        (rf"{_API}/(tag|branch)/(?P<rev>[^/]+)", _point),
        (rf"{_API}/preupload/(?P<rev>[^/]+)", _preupload),
        (rf"{_API}/commit/(?P<rev>[^/]+)", _commit),
        (rf"{_API}/lfs-files/duplicate", _duplicate),
        (rf"{_API}/xet-(?P<kind>read|write)-token/(?P<rev>.+)", _xet_token),
        (rf"{_PAGE}\.git/info/lfs/objects/batch", _batch),
        (rf"{_PAGE}/verify", _verify),
        (rf"{_PAGE}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _resolve),
    )
