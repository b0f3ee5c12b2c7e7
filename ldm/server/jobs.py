"""The queue of jobs: one thread runs them in order, and every change is published to those who listen."""

import asyncio
import re
import secrets
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Final, Literal, get_args

from ldm.config import Config
from ldm.server.request import GenerationRequest

MAX_QUEUE: Final = 256  # jobs that wait or run
MAX_ENDED: Final = 256  # jobs whose end can still be asked for
MAX_LISTENERS: Final = 32
KEEP_ALIVE: Final = 15  # seconds without news after which a stream shows that it is alive
EndState = Literal["finished", "stopped", "failed"]
State = Literal["queued", "loading", "sampling"] | EndState


class QueueFull(Exception):
    """No more jobs are taken."""


class Closing(Exception):
    """The server ends."""


class JobView(Config):
    """A job as clients see it."""

    id: str
    number: int
    """jobs run in this order"""
    state: State
    request: GenerationRequest
    step: int
    """sampling steps that are done, of all its images"""
    steps: int
    """0 where they are not known yet"""
    seconds: float
    """from where it began to sample to its newest step"""
    seconds_left: float | None
    preview: str | None
    """a data URL: what the newest step predicts"""
    images: list[str]
    """ids of the images that are done"""
    warnings: list[str]
    error: str | None


class Job:
    """A request and what became of it so far. The worker's thread changes it; others ask it to stop or to skip."""

    def __init__(self, number: int, request: GenerationRequest) -> None:
        self.id, self.number, self.request = secrets.token_hex(8), number, request
        self.state: State = "queued"
        self.stops = self.skips = False  # what was asked for
        self.cut_short = False
        self.step = self.steps = self.skipped = 0
        self.seconds = 0.0
        self.preview: str | None = None
        self.images: list[str] = []
        self.warnings: list[str] = []
        self.error: str | None = None

    def view(self) -> JobView:
        """A copy of what clients see."""
        left = None
        if self.state == "sampling" and self.step > self.skipped:
            left = self.seconds / (self.step - self.skipped) * (self.steps - self.step)
        own = {name: getattr(self, name) for name in JobView.model_fields if name != "seconds_left"}
        return JobView.model_construct(**own | {"images": self.images.copy(), "seconds_left": left})


Run = Callable[[Job, Callable[[], None]], None]
"""Does a job, and calls the second argument after each change of it, which may raise Closing."""


class Jobs:
    """Jobs in the order in which they came. A thread of its own calls `prepare`, then `run` for one at a time."""

    def __init__(self, run: Run, prepare: Callable[[], None] = lambda: None) -> None:
        self._run, self._prepare, self.events = run, prepare, Events()
        self._condition = threading.Condition()
        self._live: OrderedDict[str, Job] = OrderedDict()
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._count, self._closing = 0, False
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)

    def start(self) -> None:
        """Begin to work; to be called in the event loop of those who listen."""
        self.events.start()
        self._thread.start()

    def close(self) -> None:
        """End with the step that is running; what waits is dropped. Callable in a signal handler."""
        self._closing = True
        self.events.close()

    def join(self, seconds: float) -> None:
        """Wait until the work has ended, so long at most."""
        with self._condition:
            self._condition.notify_all()
        self._thread.join(seconds)

    def submit(self, request: GenerationRequest) -> Job:
        """Add a job. QueueFull: as many as can wait do."""
        with self._condition:
            if len(self._live) >= MAX_QUEUE:
                raise QueueFull(f"{MAX_QUEUE} jobs wait already: try again when some have ended")
            self._count += 1
            job = Job(self._count, request)
            self._live[job.id] = job
            self.events.publish(job.view())
            self._condition.notify_all()
        return job

    def get(self, job_id: str) -> Job | None:
        """A job that waits, runs, or has ended not long ago."""
        with self._condition:
            return self._live.get(job_id) or self._ended.get(job_id)

    def live(self) -> list[Job]:
        """The jobs that wait or run, in order."""
        with self._condition:
            return list(self._live.values())

    def stop(self, job: Job) -> None:
        """Stop a job after its step, or at once where it waits."""
        with self._condition:
            job.stops = True
            if job.state == "queued":
                self._end(job, "stopped")
                self.events.publish(job.view())

    def skip(self, job: Job) -> None:
        """Leave out what a job samples at this moment."""
        job.skips = True

    def _end(self, job: Job, state: EndState) -> None:
        job.state, job.preview = state, None
        self._live.pop(job.id, None)
        self._ended[job.id] = job
        while len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def _work(self) -> None:
        try:
            self._prepare()
        except Exception:  # which the first job will meet, too
            traceback.print_exc(file=sys.stderr)
        while (job := self._next()) is not None:
            with suppress(Closing):
                self._do(job)

    def _next(self) -> Job | None:
        """The job that has waited longest, which is loading from now on; None at the end."""
        with self._condition:
            while not self._closing and not self._live:
                self._condition.wait(timeout=1)  # as a signal handler cannot notify
            if self._closing:
                return None
            job = next(iter(self._live.values()))
            job.state = "loading"
            return job

    def _do(self, job: Job) -> None:
        def changed() -> None:
            if self._closing:
                raise Closing
            self.events.publish(job.view())

        state: EndState = "failed"
        try:
            changed()
            self._run(job, changed)
            state = "stopped" if job.cut_short else "finished"
        except Closing:
            raise
        except (ValueError, OSError) as error:
            job.error = str(error)
        except Exception as error:
            if re.search("out of memory|allocate memory", str(error)):  # each device has an error of its own
                job.error = "out of memory: choose a smaller size, batch_size or vae_tile"
            else:
                traceback.print_exc(file=sys.stderr)
                job.error = f"unexpected {type(error).__name__}: see the terminal of the server"
        with self._condition:
            self._end(job, state)
        self.events.publish(job.view())


class Events:
    """From the worker's thread to listeners in the event loop. Each has the newest view of a job, not all before it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: set[Listener] = set()
        self._closed = False

    def start(self) -> None:
        """In the event loop of the listeners."""
        self._loop = asyncio.get_running_loop()

    def publish(self, view: JobView) -> None:
        """From any thread."""
        if self._loop is not None and not self._closed:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._deliver, view)

    def _deliver(self, view: JobView) -> None:
        for listener in self._listeners:
            listener.add(view)

    def close(self) -> None:
        """End all streams. Callable in a signal handler."""
        self._closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.wake()

    @property
    def is_full(self) -> bool:
        """Whether no more may listen."""
        return len(self._listeners) >= MAX_LISTENERS

    async def listen(
        self, before: Callable[[], list[JobView]], job_id: str | None = None, interval: float = 0.0
    ) -> AsyncIterator[JobView | None]:
        """What was before, then the newest view of each job that changes, or of one to its end; None: still alive.

        Changes that are less than `interval` seconds apart are joined.
        """
        listener = Listener(job_id)
        self._listeners.add(listener)
        try:
            for view in before():
                listener.add(view)
            while not self._closed:
                views = await listener.take()
                for view in views:
                    yield view
                    if job_id is not None and view.state in get_args(EndState):
                        return
                if not views:
                    yield None
                await asyncio.sleep(interval)
        finally:
            self._listeners.discard(listener)


class Listener:
    """What one client has not been sent yet."""

    def __init__(self, job_id: str | None) -> None:
        self._job_id, self._pending, self._news = job_id, dict[str, JobView](), asyncio.Event()

    def add(self, view: JobView) -> None:
        """Replace what was pending of this job."""
        if self._job_id in (None, view.id):
            self._pending[view.id] = view
            self._news.set()

    def wake(self) -> None:
        """Let `take` return."""
        self._news.set()

    async def take(self) -> list[JobView]:
        """Wait for news, for KEEP_ALIVE seconds at most."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), KEEP_ALIVE)
        views, self._pending = list(self._pending.values()), {}
        self._news.clear()
        return views
