"""The HTTP API and the files of the page."""

import re
import secrets
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, File, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import APIKeyHeader

from ldm.config import Config, explain_errors
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timesteps import SCHEDULES
from ldm.imaging import decode_image, image_size
from ldm.io.model_dir import read_json
from ldm.server import request as limits
from ldm.server.generator import Generator
from ldm.server.guard import HEADERS, TOKEN_HEADER, UPLOADS, Access, Guard
from ldm.server.history import Entry
from ldm.server.jobs import Jobs, JobView, QueueFull
from ldm.server.request import GenerationRequest

STATIC = Path(__file__).parent / "static"
SWAGGER = Path(str(files("fastapi_offline"))) / "static"
MAX_MEGAPIXELS = 16  # of an upload
CACHED = {"Cache-Control": "private, max-age=31536000, immutable"}  # an id stands for the same bytes for ever
Token = Depends(APIKeyHeader(name=TOKEN_HEADER, auto_error=False, description="`token` of `/api/session`"))


class ModelView(Config):
    """A model that can be asked for, and its own settings where they are known."""

    name: str
    resolution: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None


class Session(Config):
    """What a client needs to know first."""

    token: str
    """for the header x-ldm-token of every POST"""
    models: list[ModelView]
    samplers: list[str]
    schedules: list[str]
    limits: dict[str, int]


class Upload(Config):
    """An image that was uploaded."""

    id: str
    width: int
    height: int
    settings: dict[str, Any] | None
    """the request that its metadata amounts to, where it was generated here or by txt2img or img2img"""
    notes: list[str]
    """what of the settings cannot be used here"""


class Failure(Config):
    """Why a request was refused."""

    error: str


def create_app(jobs: Jobs, generator: Generator, access: Access) -> FastAPI:
    """The application around a queue."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs.start()
        yield
        jobs.close()
        jobs.join()

    app = FastAPI(title="ldm", lifespan=lifespan, docs_url=None, redoc_url=None, responses={"4XX": {"model": Failure}})
    app.add_middleware(Guard, access=access)
    history, decoding = generator.history, Lock()

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [{**fault, "loc": fault["loc"][1:]} for fault in error.errors()]  # without "body"
        lines = explain_errors(GenerationRequest, SimpleNamespace(errors=lambda: faults), "request")  # type: ignore[arg-type]
        return JSONResponse({"error": "\n".join(lines)}, 422)

    @app.exception_handler(HTTPException)
    async def describe(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.get("/api/session")
    def session() -> Session:
        """The token, the models and what settings may be."""
        models = [describe_model(name, path) for name, path in generator.models().items()]
        found = {"steps": limits.MAX_STEPS, "side": limits.MAX_SIDE, "images": limits.MAX_IMAGES}
        return Session(
            token=access.token, models=models, samplers=list(SAMPLERS), schedules=list(SCHEDULES), limits=found
        )

    @app.post("/api/jobs", status_code=201, dependencies=[Token])
    async def submit(request: GenerationRequest) -> JobView:
        """Put a job into the queue. A seed that is left out is drawn here."""
        request.cells()
        seed = secrets.randbelow(limits.SEEDS) if request.seed is None else request.seed
        images = {name: history.find_input(value) for name in ("image", "mask") if (value := getattr(request, name))}
        return jobs.submit(request.model_copy(update={"seed": seed, **images})).view()

    @app.get("/api/jobs")
    async def live() -> list[JobView]:
        """The jobs that wait or run, in order."""
        return [job.view() for job in jobs.live()]

    @app.get("/api/jobs/{job_id}")
    async def job(job_id: str) -> JobView:
        """A job that waits, runs, or has ended not long ago."""
        return found(jobs.get(job_id)).view()

    @app.post("/api/jobs/{job_id}/{wish}", dependencies=[Token])
    async def ask(job_id: str, wish: Literal["stop", "skip"]) -> JobView:
        """Stop a job, which keeps the image as its preview shows it, or skip the images that it samples now."""
        job = found(jobs.get(job_id))
        jobs.ask(job, wish)
        return job.view()

    @app.get("/api/events", response_class=StreamingResponse)
    async def events(job: Annotated[str | None, Query(max_length=100)] = None) -> StreamingResponse:
        """Server-sent events, each a job as it is after a change: of all jobs, or of one until it ends."""
        if jobs.events.is_full:
            raise HTTPException(503, "too many clients listen: close a tab")
        before = [found(jobs.get(job))] if job else jobs.live()
        views = jobs.events.listen([one.view() for one in before], job)

        async def stream() -> AsyncIterator[str]:
            async for view in views:
                yield f"data: {view.model_dump_json()}\n\n" if view else ": alive\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    @app.post(UPLOADS, status_code=201, dependencies=[Token])
    def upload(file: Annotated[UploadFile, File(description="PNG, JPEG or WebP")]) -> Upload:
        """Upload an image to start from or a mask, or a generated one to read its settings."""
        with decoding:  # one at a time, as each may take much memory
            data = file.file.read()
            height, width = image_size(data)
            if height * width > MAX_MEGAPIXELS * 1e6:
                raise ValueError(f"larger than {MAX_MEGAPIXELS} megapixels, which is the limit here: shrink it")
            image = decode_image(data)
            settings, notes = history.read_settings(data, generator.models())
            return Upload(
                id=history.add_input(image), width=image.width, height=image.height, settings=settings, notes=notes
            )

    @app.get("/api/uploads/{input_id}")
    def uploaded(input_id: str) -> FileResponse:
        """An upload, as PNG."""
        return written(history.input_file(input_id))

    @app.get("/api/images")
    async def images(
        before: Annotated[str | None, Query(max_length=100)] = None, limit: Annotated[int, Query(ge=1, le=200)] = 60
    ) -> list[Entry]:
        """The newest images, or those before one of them."""
        return history.entries(before=before, limit=limit)

    @app.get("/api/images/{image_id}")
    async def image(image_id: str) -> Entry:
        """What is known of an image."""
        return found(history.get(image_id))

    @app.get("/api/images/{image_id}/file")
    def image_file(image_id: str) -> FileResponse:
        """The PNG of an image, with its metadata."""
        return written(history.file(image_id))

    @app.get("/api/images/{image_id}/thumbnail")
    def thumbnail(image_id: str) -> Response:
        """A small PNG of an image."""
        return Response(found(history.thumbnail(image_id)), media_type="image/png", headers=CACHED)

    @app.get("/api/images/{image_id}/film")
    def film(image_id: str) -> FileResponse:
        """Previews after each step in a row: the states, and below them the predictions."""
        return written(history.film_file(image_id), "image/jpeg")

    @app.exception_handler(ValueError)
    async def refuse(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(QueueFull)
    async def wait(request: Request, error: QueueFull) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 429)

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    for name in ("page.css", "page.js"):
        add_static(app, f"/{name}", STATIC / name)
    add_docs(app)
    return app


def add_static(app: FastAPI, path: str, file: Path) -> None:
    """Serve a file of the page."""
    app.get(path, include_in_schema=False)(lambda: FileResponse(file))


def add_docs(app: FastAPI) -> None:
    """FastAPI's page of the API, with its files from a package, as no request leaves this machine."""
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        add_static(app, f"/docs/{name}", SWAGGER / name)
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="ldm",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    inline = re.findall("<script>(.*?)</script>", bytes(page.body).decode(), re.DOTALL)
    hashes = [f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in inline]
    policy = HEADERS["Content-Security-Policy"].replace("script-src", " ".join(["script-src", *hashes]))
    page.headers["Content-Security-Policy"] = policy.replace("style-src", "style-src 'unsafe-inline'")
    app.get("/docs", include_in_schema=False)(lambda: page)


def describe_model(name: str, path: Path) -> ModelView:
    """A model and its own settings, as far as its model.json has them."""
    file = path / "model.json"
    values = read_json(file) if file.is_file() else {}
    metadata = values.get("metadata") or {}
    own = {key: metadata.get(key) for key in ("steps", "guidance_scale")}
    return ModelView(name=name, resolution=values.get("resolution", values.get("size")), **own)


def found(value: Any) -> Any:
    """What was looked up; HTTP 404 where there is none."""
    if value is None:
        raise HTTPException(404, "there is nothing of this id")
    return value


def written(path: Path | None, media_type: str = "image/png") -> FileResponse:
    """An image that the server has written; HTTP 404 where there is none."""
    return FileResponse(found(path if path and path.is_file() else None), media_type=media_type, headers=CACHED)
