"""What the loopback Hub says to which request.

The paths, headers and bodies are those that huggingface_hub 1 and 2 send and read.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

from loopback_hub.store import Hub, Repository, User, front_matter, git_sha1, is_large, oid


class Request(NamedTuple):
    method: str
    path: str
    """Still quoted."""
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), "")


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}


class _RefusedError(Exception):
    """Ends the making of an answer with another one."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer = Answer(status, json.dumps({"error": message}).encode(), headers)


def answer(hub: Hub, request: Request) -> Answer:
    """Return what the Hub says."""
    for pattern, reply in _ROUTES:
        match = re.fullmatch(pattern, f"{request.method} {request.path}")
        if match is None:
            continue
        try:
            return reply(hub, request, *(unquote(part) if part is not None else "" for part in match.groups()))
        except _RefusedError as refused:
            return refused.answer
    return Answer(404, b'{"error": "no such page"}')


def _json(value: Any, **headers: str) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


def _user(hub: Hub, request: Request) -> User | None:
    """Return who asks; None for nobody in particular."""
    token = request.header("Authorization").removeprefix("Bearer ")
    if not token:
        return None
    if token not in hub.users:
        raise _RefusedError(401, "Invalid credentials in Authorization header")
    return hub.users[token]


def _repository(hub: Hub, request: Request, kinds: str, name: str) -> Repository:
    """Return a repository that the user may know of."""
    user = _user(hub, request)
    found = hub.repositories.get((kinds.removesuffix("s"), name))
    if found is None or (found.private and not (user and user.owns(name))):
        if user is None:
            raise _RefusedError(401, "Invalid username or password.")
        raise _RefusedError(404, "Repository not found", "RepoNotFound")
    return found


def _require_write(hub: Hub, request: Request, name: str) -> None:
    user = _user(hub, request)
    if user is None:
        raise _RefusedError(401, "Invalid username or password.")
    if not (user.may_write and user.owns(name)):
        space = name.split("/")[0]
        raise _RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{space}"')


def _commit_at(repository: Repository, revision: str) -> Any:
    commit = repository.at(revision or "main")
    if commit is None:
        raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def _whoami(hub: Hub, request: Request) -> Answer:
    user = _user(hub, request)
    if user is None:
        raise _RefusedError(401, "Invalid username or password.")
    orgs = [{"name": org, "type": "org", "roleInOrg": "write"} for org in user.orgs]
    return _json({"type": "user", "name": user.name, "orgs": orgs, "auth": {"type": "access_token"}})


def _create(hub: Hub, request: Request) -> Answer:
    wanted = json.loads(request.body)
    user = _user(hub, request)
    name = f"{wanted.get('organization') or (user.name if user else 'nobody')}/{wanted['name']}"
    _require_write(hub, request, name)
    kind = wanted.get("type") or "model"
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    url = {"url": f"{hub.address}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name}
    if (kind, name) in hub.repositories:
        return Answer(409, json.dumps({"error": "You already created this model repo", **url}).encode())
    hub.repositories[kind, name] = Repository(name, kind, private)
    hub.repositories[kind, name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
    return _json(url)


def _validate_yaml(hub: Hub, request: Request) -> Answer:
    metadata = front_matter(json.loads(request.body)["content"])
    if metadata is None:
        return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    wrong = [key for key in ("license", "library_name", "pipeline_tag") if not isinstance(metadata.get(key, ""), str)]
    errors = [{"message": f'"{key}" must be a string'} for key in wrong]
    return _json({"errors": errors, "warnings": []})._replace(status=400 if errors else 200)


def _info(hub: Hub, request: Request, kinds: str, name: str, revision: str | None = None) -> Answer:
    repository = _repository(hub, request, kinds, name)
    commit = _commit_at(repository, revision or "main")
    return _json(_describe(repository, commit), **{"X-Repo-Commit": commit.sha})


def _describe(repository: Repository, commit: Any) -> dict[str, Any]:
    return {
        **{"id": repository.name, "modelId": repository.name, "author": repository.name.split("/")[0]},
        **{"sha": commit.sha, "private": repository.private, "gated": "auto" if repository.gated else False},
        **{"disabled": False, "downloads": repository.downloads, "likes": 0, "tags": repository.tags},
        **{"cardData": repository.metadata, "lastModified": "2026-01-01T00:00:00.000Z"},
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
    }


def _search(hub: Hub, request: Request) -> Answer:
    """List models whose tags hold every filter, the most downloaded first, two a page."""
    user = _user(hub, request)
    wanted = set(request.query.get("filter", []))
    visible = [r for (kind, name), r in hub.repositories.items() if kind == "model" and _may_see(user, r)]
    found = sorted((r for r in visible if wanted <= set(r.tags)), key=lambda r: -r.downloads)
    first = int(request.query.get("cursor", ["0"])[0])
    size = min(2, int(request.query.get("limit", ["2"])[0]))
    page = [_describe(repository, repository.head) for repository in found[first : first + size]]
    headers = {}
    if first + size < len(found):
        filters = "&".join(f"filter={tag}" for tag in sorted(wanted))
        headers["Link"] = f'<{hub.address}/api/models?{filters}&limit={size}&cursor={first + size}>; rel="next"'
    return _json(page, **headers)


def _may_see(user: User | None, repository: Repository) -> bool:
    return not repository.private or (user is not None and user.owns(repository.name))


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
    if is_large(path):
        sha256 = hashlib.sha256(content).hexdigest()
        entry |= {"oid": git_sha1(sha256.encode()), "lfs": {"oid": sha256, "size": len(content), "pointerSize": 134}}
    return entry


def _tree(hub: Hub, request: Request, kinds: str, name: str, revision: str, below: str = "") -> Answer:
    """List files and folders below a folder: all of them if asked to, else its own."""
    commit = _commit_at(_repository(hub, request, kinds, name), revision)
    start = f"{below}/" if below else ""
    inside = {path: text for path, text in commit.files.items() if path.startswith(start)}
    if below and not inside:
        raise _RefusedError(404, f"{below} does not exist", "EntryNotFound")
    folders = {str(folder) for path in inside for folder in PurePosixPath(path).parents if str(folder) != "."}
    entries = {path: _entry(path, content) for path, content in inside.items()}
    entries |= {path: {"type": "directory", "path": path, "oid": git_sha1(path.encode())} for path in folders}
    everything = request.query.get("recursive", [""])[0].lower() == "true"
    wanted = [path for path in sorted(entries) if path.startswith(start)]
    return _json([entries[path] for path in wanted if everything or "/" not in path.removeprefix(start)])


def _paths_info(hub: Hub, request: Request, kinds: str, name: str, revision: str) -> Answer:
    commit = _commit_at(_repository(hub, request, kinds, name), revision)
    is_json = "json" in request.header("Content-Type")
    asked = json.loads(request.body)["paths"] if is_json else parse_qs(request.body.decode()).get("paths", [])
    return _json([_entry(path, commit.files[path]) for path in asked if path in commit.files])


def _refs(hub: Hub, request: Request, kinds: str, name: str) -> Answer:
    head = _repository(hub, request, kinds, name).head.sha
    branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": head}
    return _json({"branches": [branch], "converts": [], "tags": [], "pullRequests": []})


def _preupload(hub: Hub, request: Request, kinds: str, name: str, revision: str) -> Answer:
    repository = _repository(hub, request, kinds, name)
    _require_write(hub, request, name)
    present = _commit_at(repository, revision).files
    files = []
    for file in json.loads(request.body)["files"]:
        path = file["path"]
        mode = "lfs" if is_large(path) else "regular"
        known = oid(path, present[path]) if path in present else None
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
    return _json({"files": files})


def _batch(hub: Hub, request: Request, kinds: str, name: str) -> Answer:
    """Tell which large files are wanted, and where they go; those that are here already have no `actions`."""
    _repository(hub, request, kinds or "models", name)
    _require_write(hub, request, name)
    objects: list[dict[str, Any]] = []
    for file in json.loads(request.body)["objects"]:
        entry = {"oid": file["oid"], "size": file["size"]}
        if file["oid"] not in hub.large:
            entry["actions"] = {
                "upload": {"href": f"{hub.cdn}/lfs/{file['oid']}"},
                "verify": {"href": f"{hub.address}/lfs-verify/{name}"},
            }
        objects.append(entry)
    return _json({"transfer": "basic", "objects": objects})


def _store(hub: Hub, request: Request, sha256: str) -> Answer:
    if request.header("Authorization"):
        raise _RefusedError(400, "a token was sent to the storage, which is another host")
    if hashlib.sha256(request.body).hexdigest() != sha256:
        raise _RefusedError(400, "XAmzContentSHA256Mismatch")
    hub.large[sha256] = request.body
    return Answer(200, headers={"ETag": f'"{sha256[:32]}"'})


def _verify(hub: Hub, request: Request, name: str) -> Answer:
    wanted = json.loads(request.body)
    if len(hub.large.get(wanted["oid"], b"")) != wanted["size"]:
        raise _RefusedError(404, "no such object")
    return Answer(200, b"{}")


def _commit(hub: Hub, request: Request, kinds: str, name: str, revision: str) -> Answer:
    """Make a commit of newline-delimited JSON, whole or not at all."""
    repository = _repository(hub, request, kinds, name)
    _require_write(hub, request, name)
    try:
        lines = [json.loads(line) for line in request.body.splitlines()]
    except ValueError:
        raise _RefusedError(400, "not newline-delimited JSON") from None
    header = lines[0]["value"]
    if header.get("parentCommit", repository.head.sha) != repository.head.sha:
        raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repository.head.files)
    for line in lines[1:]:
        _apply(hub, files, line["key"], line["value"])
    made = repository.commit(files, header["summary"])
    url = f"{hub.address}/{name}/commit/{made.sha}"
    return _json({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})


def _apply(hub: Hub, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
    """Do one operation of a commit to `files`."""
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        if value["oid"] not in hub.large:
            raise _RefusedError(400, "LFS pointer to a file that was never uploaded")
        files[value["path"]] = hub.large[value["oid"]]
    elif key == "deletedFile":
        del files[value["path"]]
    else:
        raise _RefusedError(400, f"unknown operation {key}")


def _resolve(hub: Hub, request: Request, kinds: str, name: str, revision: str, path: str) -> Answer:
    """Serve a small file, or say where a large one lies."""
    repository = _repository(hub, request, kinds or "models", name)
    user = _user(hub, request)
    if repository.gated and not (user and (user.owns(name) or name in user.gates)):
        raise _RefusedError(403 if user else 401, f"Access to model {name} is restricted.", "GatedRepo")
    commit = _commit_at(repository, revision)
    if path not in commit.files:
        refused = _RefusedError(404, "Entry not found", "EntryNotFound").answer
        return refused._replace(headers={**refused.headers, "X-Repo-Commit": commit.sha})
    content = commit.files[path]
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{oid(path, content)}"', "Accept-Ranges": "bytes"}
    if not is_large(path):
        return _part(hub, request, path, content, headers)
    sha256 = hashlib.sha256(content).hexdigest()
    headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
    return Answer(302, b"", {**headers, "Location": f"{hub.cdn}/cdn/{sha256}/{path}"})


def _stored(hub: Hub, request: Request, sha256: str, path: str) -> Answer:
    if request.header("Authorization"):
        raise _RefusedError(400, "a token was sent to the storage, which is another host")
    return _part(hub, request, path, hub.large[sha256], {"ETag": f'"{sha256[:32]}"', "Accept-Ranges": "bytes"})


def _part(hub: Hub, request: Request, path: str, content: bytes, headers: dict[str, str]) -> Answer:
    """Return a file, or the range of it that was asked for; count its bytes."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.header("Range"))
    status, name = 200, path.rpartition("/")[2]
    if wanted is not None:
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        status, content = 206, content[first : last + 1]
    hub.sent[name] = hub.sent.get(name, 0) + (len(content) if request.method != "HEAD" else 0)
    return Answer(status, content, headers)


_KINDS, _NAME = r"(models|datasets)", r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (r"GET /api/whoami-v2", _whoami),
    (r"POST /api/repos/create", _create),
    (r"POST /api/validate-yaml", _validate_yaml),
    (r"GET /api/models", _search),
    (rf"GET /api/{_KINDS}/{_NAME}", _info),
    (rf"GET /api/{_KINDS}/{_NAME}/revision/([^/]+)", _info),
    (rf"GET /api/{_KINDS}/{_NAME}/tree/([^/]+)(?:/(.+))?", _tree),
    (rf"POST /api/{_KINDS}/{_NAME}/paths-info/([^/]+)", _paths_info),
    (rf"GET /api/{_KINDS}/{_NAME}/refs", _refs),
    (rf"POST /api/{_KINDS}/{_NAME}/preupload/([^/]+)", _preupload),
    (rf"POST /api/{_KINDS}/{_NAME}/commit/([^/]+)", _commit),
    (rf"POST /(?:(datasets)/)?{_NAME}\.git/info/lfs/objects/batch", _batch),
    (r"PUT /lfs/([0-9a-f]+)", _store),
    (rf"POST /lfs-verify/{_NAME}", _verify),
    (r"(?:GET|HEAD) /cdn/([0-9a-f]+)/(.+)", _stored),
    (rf"(?:GET|HEAD) /(?:(datasets)/)?{_NAME}/resolve/([^/]+)/(.+)", _resolve),
]
