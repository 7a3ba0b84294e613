"""A fake W&B server with the requests that `wandb sync` makes; it keeps what is sent to it."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
            answer = {
                "data": self.server.answer(asked["operationName"], asked.get("variables", {}))
            }
        elif self.path.startswith("/upload/"):
            self.server.files[self.path.removeprefix("/upload/")] = body
        elif self.path.endswith("/file_stream"):
            run = self.path.split("/")[-2]
            sent = json.loads(body).get("files", {}).get("wandb-history.jsonl")
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
