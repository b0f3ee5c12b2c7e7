"""What the command serve does: the page on an address of this machine, until it is stopped."""

import asyncio
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

import psutil
import uvicorn
from pydantic import Field

from ldm.cli import ScriptConfig
from ldm.pipeline.load import check_exists
from ldm.precision import Precision
from ldm.server.app import create_app
from ldm.server.generator import Generator, find_models
from ldm.server.guard import Access
from ldm.server.history import History
from ldm.server.jobs import Jobs

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeConfig(ScriptConfig):
    """Settings of serve."""

    port: int = Field(7860, ge=0, lt=2**16)
    """0 takes one that is free"""
    listen: str | None = None
    """address on which other machines reach the page, such as 0.0.0.0; they need the token that is printed"""
    model: Path | None = None
    """the first model of the list; the newest below runs/ and models/ when left out"""
    out: Path = Path("outputs/page")
    """folder for the images, which are the history of the page"""
    device: str | None = None
    """cpu, cuda or mps; the best available one when left out"""
    precision: Precision | None = None
    """what the networks compute in; when left out bf16 on GPUs that have it, else float32"""


class Server(uvicorn.Server):
    """Ends within a sampling step when it is asked to."""

    def __init__(self, config: uvicorn.Config, jobs: Jobs, history: History) -> None:
        super().__init__(config)
        self.jobs, self.history = jobs, history

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal; streams would go on for ever."""
        self.jobs.close()
        super().handle_exit(sig, frame)


def build_server(config: ServeConfig) -> tuple[Server, socket.socket, Access]:
    """The server, the socket that it will serve, and who may ask. ValueError: there is no model, or no such address."""
    models = partial(listed_models, config.model)
    if not models():
        raise ValueError("no model below runs/ or models/: run `make demo` first, or pass --model")
    if config.model:
        check_exists(config.model)
    history = History(config.out)
    listener = listen(config.listen or LOOPBACK[0], config.port)
    access = Access(addresses(config.listen), listener.getsockname()[1], open_reading=config.listen is None)
    generator = Generator(models, history, device=config.device, precision=config.precision)
    jobs = Jobs(generator.run, generator.load_first)
    app = create_app(jobs, generator, access)
    settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    return Server(settings, jobs, history), listener, access


def serve(config: ServeConfig) -> None:
    """Serve the page until a signal ends it."""
    server, listener, access = build_server(config)
    if access.open_reading:
        print(f"http://{LOOPBACK[0]}:{access.port}", flush=True)
    else:
        print("warning: whoever reads this address can generate here; nothing is encrypted", file=sys.stderr)
        for host in sorted(access.hosts):
            print(f"http://{host}/?token={access.token}", flush=True)
    with suppress(KeyboardInterrupt):
        asyncio.run(server.serve(sockets=[listener]))


def listed_models(first: Path | None) -> dict[str, Path]:
    """The models by name, one of them first."""
    own = {first.as_posix(): first} if first else {}
    return own | find_models()


def listen(address: str, port: int) -> socket.socket:
    """A socket on an address and port. ValueError: it cannot be had."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise ValueError(f"{address}:{port} cannot be listened on ({error.strerror}): pass another --port") from None


def addresses(address: str | None) -> set[str]:
    """The literal addresses under which the server is reached: all of this machine where it listens on all."""
    if address in ("0.0.0.0", "::"):
        families = (socket.AF_INET, socket.AF_INET6) if address == "::" else (socket.AF_INET,)
        own = (one for found in psutil.net_if_addrs().values() for one in found if one.family in families)
        return {*LOOPBACK, *(one.address.partition("%")[0] for one in own)}
    return {address} if address else set(LOOPBACK)
