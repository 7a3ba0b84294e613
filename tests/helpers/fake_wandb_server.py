"""A fake W&B server for `wandb sync`, workspaces and reports; it keeps what is sent to it.

Where W&B ships the classes of an answer, the answer is made of them.
"""

import gzip
import json
import re
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pydantic import BaseModel
from wandb.apis._generated import fragments, get_projects, get_viewer

PROJECT = {"id": "p", "name": "diffusion-lab", "entityName": "me"}


def answer_of(kind: type[BaseModel], **known: object) -> dict:
    """An object of one of W&B's classes as a server sends it; what is not given is null."""
    fields = {field.alias or name: None for name, field in kind.model_fields.items()}
    fields.pop("__typename", None)  # which has a default
    return kind.model_validate(fields | known).model_dump(by_alias=True, mode="json")


class Server(ThreadingHTTPServer):
    """A server that keeps the history rows, configurations, files and artifacts it is sent."""

    daemon_threads = True
    request_queue_size = 128  # files come all at once, and a refused one is not retried

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, dict[int, dict]] = {}  # rows by run and line
        self.configs: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.artifacts: list[str] = []
        self.summaries: dict[str, dict] = {}
        self.views: dict[str, dict] = {}  # workspaces and reports by id

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, name: str, variables: dict) -> dict:
        """The data that answer a GraphQL operation."""
        if name == "UpsertBucket":
            run = variables["name"]
            self.configs[run] = json.loads(variables["config"] or "{}")
            project = {"id": "p", "name": "diffusion-lab", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": run, "name": run, "displayName": run, "project": project}
            lines = {"historyLineCount": len(self.history.get(run, {}))}
            return {"upsertBucket": {"bucket": bucket | lines, "inserted": True}}
        if name == "CreateArtifact":
            self.artifacts.append(variables["input"]["artifactCollectionName"])
            sequence = {"latestArtifact": None}
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if name == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"{self.url}/upload/{file}"}
                for file in variables["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if name.lower().startswith("upsertview"):
            known = {"description": "", "updatedAt": "2026-01-01", "createdAt": "2026-01-01"}
            number = b64encode(f"View:{len(self.views):04}".encode()).decode()
            view = known | variables | {"id": number, "project": PROJECT}
            self.views[view["id"]] = view
            return {"upsertView": {"view": view, "inserted": True}}
        if name == "ProjectInternalId":
            return {"project": {"internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}
        if name == "SpecificReport":
            return {"view": self.views[variables["reportId"]]}
        if name == "View":
            found = [v for v in self.views.values() if v["name"] == variables["viewName"]]
            return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}
        if name in ("GetViewer", "GetDefaultEntity", "Viewer"):
            user = answer_of(fragments.UserFragment, id="u", name="me", entity="me")
            return answer_of(get_viewer.GetViewer, viewer=user)
        if name == "GetProjects":
            project = PROJECT | {"createdAt": "2026-01-01", "isBenchmark": False}
            edges = [{"node": answer_of(fragments.ProjectFragment, **project)}]
            page = answer_of(fragments.PageInfoFragment, hasNextPage=False)
            models = answer_of(get_projects.GetProjectsModels, pageInfo=page, edges=edges)
            return answer_of(get_projects.GetProjects, models=models)
        if name == "RunResumeStatus":
            return {"model": {"id": "p", "name": "", "entity": {"id": "e", "name": "me"}}}
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = {}
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            name = asked.get("operationName") or re.search(r"\w+ (\w+)", asked["query"])[1]
            answer = {"data": self.server.answer(name, asked.get("variables") or {})}
        elif self.path.startswith("/upload/"):
            self.server.files[self.path.removeprefix("/upload/")] = body
        elif self.path.endswith("/file_stream"):
            run = self.path.split("/")[-2]
            files = json.loads(body).get("files", {})
            if summary := files.get("wandb-summary.json"):
                self.server.summaries[run] = json.loads(summary["content"][-1])
            sent = files.get("wandb-history.jsonl")
            if sent:
                rows = self.server.history.setdefault(run, {})
                rows |= {
                    sent["offset"] + i: json.loads(row) for i, row in enumerate(sent["content"])
                }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = respond

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@contextmanager
def serving() -> Iterator[Server]:
    """Runs the server in its own thread during the block."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
