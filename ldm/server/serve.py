"""What the command serve does: the page on an address of this machine, until it is stopped."""

import asyncio
import socket
import sys
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import FrameType

import psutil
import uvicorn
from pydantic import Field

from ldm.cli import ScriptConfig
from ldm.pipeline.load import check_exists
from ldm.precision import Precision
from ldm.server.app import create_app
from ldm.server.guard import Access, Guard
from ldm.server.history import History
from ldm.server.jobs import Jobs
from ldm.server.runner import ModelRunner, find_models

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeConfig(ScriptConfig):
    """Settings of serve."""

    port: int = Field(7860, ge=0, lt=2**16)
    """0 takes one that is free"""
    listen: str | None = None
    """address on which other machines reach the page, such as 0.0.0.0; they need the token that is printed"""
    model: Path | None = None
    """the first model of the list; when left out the newest below runs/, or where there is none below models/"""
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
    history, address = History(config.out), literal(config.listen)
    listener = listen(address or LOOPBACK[0], config.port)
    access = Access(addresses(address), listener.getsockname()[1], open_reading=address is None)
    runner = ModelRunner(models, history, device=config.device, precision=config.precision)
    jobs = Jobs(runner.run, runner.load_first)
    app = Guard(create_app(jobs, runner, access), access)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
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


def literal(address: str | None) -> str | None:
    """An IP address as browsers write it. ValueError: a name, which another site could have."""
    try:
        return address and str(ip_address(address))
    except ValueError:
        raise ValueError(f"--listen {address} is no IP address: pass one of this machine, or 0.0.0.0 for all") from None


def listen(address: str, port: int) -> socket.socket:
    """A socket on an address and port. ValueError: it cannot be had."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    both = address == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((address, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        reason = f"{address}:{port} cannot be listened on ({error.strerror})"
        raise ValueError(f"{reason}: pass another --port, or with --listen an address of this machine") from None


def addresses(address: str | None) -> set[str]:
    """The literal addresses under which the server is reached: all of this machine where it listens on all."""
    if address not in ("0.0.0.0", "::"):
        return {address} if address else set(LOOPBACK)
    families = (socket.AF_INET, socket.AF_INET6) if address == "::" else (socket.AF_INET,)
    own = {one.address for found in psutil.net_if_addrs().values() for one in found if one.family in families}
    return {"localhost", *(one for one in own if "%" not in one)}  # which a browser could not be given
