"""The HTTP API and the files of the page."""

import asyncio
import json
import re
import secrets
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal, get_args

from fastapi import Depends, FastAPI, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException as StarletteHTTPException

from ldm.config import Config, explain_errors
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timesteps import SCHEDULES
from ldm.imaging import decode_image, image_size
from ldm.io.model_dir import read_json
from ldm.server.guard import HEADERS, TOKEN_HEADER, UPLOADS, Access
from ldm.server.history import Entry
from ldm.server.jobs import Jobs, JobView, QueueFull
from ldm.server.request import RANDOM_SEEDS, Axis, GenerationRequest
from ldm.server.runner import ModelRunner

STATIC = Path(__file__).parent / "static"
SWAGGER = Path(str(files("fastapi_offline"))) / "static"
MAX_MEGAPIXELS = 16  # of an upload
SHUTDOWN_SECONDS = 20  # that the end waits for what cannot be interrupted, such as decoding an image
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
    axes: list[str]
    """settings that a grid can vary"""


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


def create_app(jobs: Jobs, runner: ModelRunner, access: Access) -> FastAPI:
    """The application around a queue."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs.start()
        yield
        jobs.close()
        await asyncio.to_thread(jobs.join, SHUTDOWN_SECONDS)

    app = FastAPI(title="ldm", lifespan=lifespan, docs_url=None, redoc_url=None, responses={"4XX": {"model": Failure}})
    history, decoding = runner.history, Lock()

    @app.exception_handler(ValueError)
    @app.exception_handler(QueueFull)
    def refuse(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 429 if isinstance(error, QueueFull) else 422)

    @app.exception_handler(StarletteHTTPException)
    def describe(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.exception_handler(RequestValidationError)
    def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [{**fault, "loc": fault["loc"][1:]} for fault in error.errors()]  # without "body"
        return JSONResponse({"error": "\n".join(explain_errors(GenerationRequest, faults, "request"))}, 422)

    @app.exception_handler(Exception)
    def fail(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"unexpected {type(error).__name__}: see the terminal of the server"}, 500)

    @app.get("/api/session")
    def session() -> Session:
        """The token, and what there is to choose from."""
        return Session(
            token=access.token,
            models=[describe_model(name, path) for name, path in runner.models().items()],
            samplers=list(SAMPLERS),
            schedules=list(SCHEDULES),
            axes=list(get_args(Axis.model_fields["setting"].annotation)),
        )

    @app.post("/api/jobs", status_code=201, dependencies=[Token])
    def submit(request: GenerationRequest) -> JobView:
        """Put a job into the queue. A seed that is left out is drawn here."""
        request.cells()
        runner.find(request.model)
        seed = secrets.randbelow(RANDOM_SEEDS) if request.seed is None else request.seed
        images = {name: history.find_input(value) for name in ("image", "mask") if (value := getattr(request, name))}
        return jobs.submit(request.model_copy(update={"seed": seed, **images})).view()

    @app.get("/api/jobs")
    async def live() -> list[JobView]:
        """The jobs that wait or run, in order."""
        return [job.view() for job in jobs.live()]

    @app.get("/api/jobs/{job_id}")
    async def job(job_id: str) -> JobView:
        """A job that waits, runs, or has ended not long ago."""
        return or_404(jobs.get(job_id)).view()

    @app.post("/api/jobs/{job_id}/stop", dependencies=[Token])
    async def stop(job_id: str) -> JobView:
        """Stop a job after its step, which keeps the images as its preview shows them; one that waits is cancelled."""
        job = or_404(jobs.get(job_id))
        jobs.stop(job)
        return job.view()

    @app.post("/api/jobs/{job_id}/skip", dependencies=[Token])
    async def skip(job_id: str) -> JobView:
        """Leave out the images that a job samples at this moment, and go on with its others."""
        job = or_404(jobs.get(job_id))
        jobs.skip(job)
        return job.view()

    @app.get("/api/events", response_class=StreamingResponse)
    async def events(
        job: Annotated[str | None, Query(max_length=100)] = None,
        interval: Annotated[float, Query(ge=0, le=1, description="seconds; changes that are closer are joined")] = 0,
    ) -> StreamingResponse:
        """Server-sent events, each a job as it is after a step or another change: of all jobs, or of one to its end."""
        if jobs.events.is_full:
            raise HTTPException(503, "too many clients listen: close a tab")
        only = [or_404(jobs.get(job))] if job else None
        views = jobs.events.listen(lambda: [one.view() for one in only or jobs.live()], job, interval)

        async def stream() -> AsyncIterator[str]:
            async for view in views:
                # In ASCII, as some clients take further characters for ends of lines.
                yield f"data: {json.dumps(view.to_dict())}\n\n" if view else ": alive\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    @app.post(UPLOADS, status_code=201, dependencies=[Token])
    def upload(
        file: Annotated[UploadFile, File(description="PNG, JPEG or WebP")],
        kind: Annotated[Literal["image", "mask"], Form(description="of a mask, what is clear stays")] = "image",
    ) -> Upload:
        """Upload an image to start from or a mask, or a generated one to read its settings."""
        with decoding:  # one at a time, as each may take much memory
            data = file.file.read()
            height, width = image_size(data)
            if height * width > MAX_MEGAPIXELS * 1e6:
                raise ValueError(f"larger than {MAX_MEGAPIXELS} megapixels, which is the limit here: shrink it")
            image = decode_image(data, background="white" if kind == "image" else "black")
            settings, notes = history.read_settings(data, runner.models())
            return Upload(
                id=history.add_input(image), width=image.width, height=image.height, settings=settings, notes=notes
            )

    @app.get("/api/uploads/{input_id}")
    def uploaded(input_id: str) -> FileResponse:
        """An upload, as PNG."""
        return image_response(history.input_file(input_id))

    @app.get("/api/images")
    async def images(
        before: Annotated[str | None, Query(max_length=100)] = None, limit: Annotated[int, Query(ge=1, le=200)] = 60
    ) -> list[Entry]:
        """The newest images, or those before one of them."""
        return history.entries(before=before, limit=limit)

    @app.get("/api/images/{image_id}")
    async def image(image_id: str) -> Entry:
        """What is known of an image."""
        return or_404(history.get(image_id))

    @app.get("/api/images/{image_id}/file")
    def image_file(image_id: str) -> FileResponse:
        """The PNG of an image, with its metadata."""
        return image_response(history.file(image_id))

    @app.get("/api/images/{image_id}/thumbnail")
    def thumbnail(image_id: str) -> Response:
        """A small PNG of an image."""
        return Response(or_404(history.thumbnail(image_id)), media_type="image/png", headers=CACHED)

    @app.get("/api/images/{image_id}/film")
    def film(image_id: str) -> FileResponse:
        """Previews after each step in a row: the states, and below them the predictions."""
        return image_response(history.film_file(image_id), "image/jpeg")

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
    try:
        values = read_json(path / "model.json")
        own = {key: values["metadata"].get(key) for key in ("steps", "guidance_scale")}
        return ModelView(name=name, resolution=values["resolution"], **own)
    except (ValueError, LookupError, TypeError, AttributeError):  # of another format, or damaged: loading it will say
        return ModelView(name=name)


def or_404(value: Any) -> Any:
    """What was looked up; HTTP 404 where there is none."""
    if value is None:
        raise HTTPException(404, "there is nothing of this id")
    return value


def image_response(path: Path | None, media_type: str = "image/png") -> FileResponse:
    """An image that the server has written; HTTP 404 where there is none."""
    return FileResponse(or_404(path if path and path.is_file() else None), media_type=media_type, headers=CACHED)
