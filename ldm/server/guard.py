"""Who may ask: the checks that every request passes before the application sees it, and the headers of every answer.

A page in a browser can send requests to any address, also to one of this machine, and a name of its own can stand for
such an address. So hosts are literal, and what changes something needs the origin and the token of this page.
"""

import secrets
from collections.abc import Iterable
from urllib.parse import parse_qs

from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-ldm-token"
MAX_JSON, MAX_UPLOAD = 2**16, 32 * 2**20  # bytes of a request's body
UPLOADS = "/api/uploads"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Access:
    """Under which addresses the server is reached, and whether reading needs the token, as where others can ask."""

    def __init__(self, addresses: Iterable[str], port: int, *, open_reading: bool = True) -> None:
        names = [f"[{address}]" if ":" in address else address for address in addresses]
        # As the header Host has them, in which browsers leave out port 80.
        self.hosts = frozenset(f"{name}:{port}" for name in names) | (frozenset(names) if port == 80 else frozenset())
        self.port, self.open_reading = port, open_reading
        self.token = secrets.token_urlsafe(24)
        self.cookie = f"ldm-{port}"  # cookies go to all ports of a host, so that another server needs another name

    def knows_token(self, given: str | None) -> bool:
        """Whether this is the token, compared in constant time."""
        return given is not None and secrets.compare_digest(given.encode(), self.token.encode())


class Guard:
    """Middleware that refuses, with a reason in JSON, what a foreign page or an unknown client could send."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *((n, v) for n, v in extra if n not in own)]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self._refusal(scope, headers) or self.app
        await answer(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Response | None:
        host, method, path = headers.get("host", ""), scope["method"], scope["path"]
        if host not in self.access.hosts:
            return _refuse(403, f"host {host[:100]!r} is not an address of this server: open the one that it printed")
        if path.startswith("/api/") and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _refuse(403, "another site's page may not ask")
        if method == "POST":
            return self._refused_post(path, host, headers)
        if method != "GET":
            return _refuse(405, f"{method} is not served")
        return None if self.access.open_reading else self._refused_get(scope, headers)

    def _refused_post(self, path: str, host: str, headers: dict[str, str]) -> Response | None:
        if headers.get("origin", f"http://{host}") != f"http://{host}":  # only what is no browser sends none
            return _refuse(403, "the origin is not this server")
        if not self.access.knows_token(headers.get(TOKEN_HEADER)):
            return _refuse(403, f"the header {TOKEN_HEADER} must be the token of this server: reload the page")
        expected, limit = ("multipart/form-data", MAX_UPLOAD) if path == UPLOADS else ("application/json", MAX_JSON)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != expected:
            return _refuse(415, f"the content type must be {expected}")
        length = headers.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in headers:
            return _refuse(411, "the body must come with its content length, in one piece")
        if int(length) > limit:
            return _refuse(413, f"larger than {limit:,} bytes, which is the limit here")
        return None

    def _refused_get(self, scope: Scope, headers: dict[str, str]) -> Response | None:
        """Without the token in a header, the cookie or the address, from where it moves into the cookie."""
        cookie = cookie_parser(headers.get("cookie", "")).get(self.access.cookie)
        if any(map(self.access.knows_token, (headers.get(TOKEN_HEADER), cookie))):
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [None])[0]
        if scope["path"] == "/" and self.access.knows_token(given):
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(self.access.cookie, self.access.token, httponly=True, samesite="lax")
            return answer
        return _refuse(403, "the token is missing: open the address that the server printed")


def _refuse(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status)
