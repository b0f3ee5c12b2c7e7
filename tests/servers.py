"""A server of the page, in this process, for the tests of its API and of the page."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx

from ldm.server.guard import TOKEN_HEADER, Access
from ldm.server.history import History
from ldm.server.jobs import Jobs
from ldm.server.serve import ServeConfig, build_server


class Running(NamedTuple):
    """A server that listens, and a client that knows its token."""

    url: str
    client: httpx.Client
    access: Access
    jobs: Jobs
    history: History

    def post(self, path: str, values: Any = None, **options: Any) -> httpx.Response:
        """A POST as the page sends it."""
        return self.client.post(path, json=values, headers={TOKEN_HEADER: self.access.token}, **options)

    def upload(self, data: bytes, name: str = "image.png") -> httpx.Response:
        """A file, as the page sends it."""
        headers = {TOKEN_HEADER: self.access.token}
        return self.client.post("/api/uploads", files={"file": (name, data)}, headers=headers)

    def submit(self, prompt: str = "a red circle", **settings: Any) -> dict[str, Any]:
        """A job of few steps."""
        answer = self.post("/api/jobs", {"prompt": prompt, "steps": 2, **settings})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def wait(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job when it has ended."""
        with self.client.stream("GET", "/api/events", params={"job": job["id"]}, timeout=120) as stream:
            return views(stream)[-1]

    def generate(self, prompt: str = "a red circle", **settings: Any) -> dict[str, Any]:
        """A job of few steps that has finished."""
        job = self.wait(self.submit(prompt, **settings))
        assert job["state"] == "finished", job["error"]
        return job


def views(stream: httpx.Response) -> list[dict[str, Any]]:
    """The jobs of a stream of events until its end."""
    return [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: ")]


@contextmanager
def running_server(**settings: Any) -> Iterator[Running]:
    """Serve on a free port until the block ends."""
    server, listener, access = build_server(ServeConfig(port=0, device="cpu", **settings))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    url = f"http://127.0.0.1:{access.port}"
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            yield Running(url, client, access, server.jobs, server.history)
    finally:
        server.jobs.close()
        server.should_exit = True
        thread.join(timeout=60)
        listener.close()
    assert not thread.is_alive()
