"""The HTTP API of the page: what it generates, what it refuses, and that it loses nothing."""

import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import serve
import txt2img
from helpers import encoded, plain
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from servers import Running, running_server, views

from ldm.io.tensors import sha256
from ldm.pipeline.generate import Txt2ImgConfig
from ldm.pipeline.record import read_png
from ldm.server import guard, jobs
from ldm.server.guard import TOKEN_HEADER
from ldm.server.history import History
from ldm.server.jobs import MAX_LISTENERS, Events, Job, Run
from ldm.server.request import GenerationRequest
from ldm.server.runner import find_models
from ldm.server.serve import addresses

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "runs/mine/model")
    return tmp_path


@pytest.fixture
def server(here: Path) -> Iterator[Running]:
    with running_server(out=Path("out")) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for what is refused, which changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shared"))
        shutil.copytree(tiny_runs / "ldm/model", "runs/mine/model")
        with running_server(out=Path.cwd() / "out") as running:
            yield running


# What it generates.


def test_it_generates_what_txt2img_generates(server: Running, here: Path) -> None:
    settings = {"steps": 3, "seed": 5, "num_images": 3, "sampler": "euler", "guidance_scale": 2.0, "batch_size": 2}
    job = server.generate("a red circle", **settings)
    assert len(job["images"]) == 3 and job["step"] == job["steps"] == 6 and job["request"]["seed"] == 5
    flags = ["--steps", "3", "--seed", "5", "--num-images", "3", "--sampler", "euler", "--guidance-scale", "2"]
    txt2img.main(["a red circle", *flags, "--batch-size", "2", "--out", "cli"])
    for index, image_id in enumerate(job["images"]):
        own = server.client.get(f"/api/images/{image_id}/file").content
        assert _pixels(own) == _pixels(Path(f"cli/{index:05d}.png").read_bytes())
    assert read_png(Path(f"out/{job['images'][2]}.png")).seed == 7  # its metadata is that of txt2img, too
    txt2img.main(["--reproduce", f"out/{job['images'][2]}.png", "--out", "again"])
    assert _pixels(Path("again/00000.png").read_bytes()) == _pixels(own)


def test_each_step_is_an_event_with_a_preview(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.server.runner.PREVIEW_SECONDS", 0)
    run = server.jobs._run
    monkeypatch.setattr(server.jobs, "_run", _in_step(run, server.jobs.events))
    server.generate()  # the model is loaded
    job = server.submit(steps=12)
    with server.client.stream("GET", "/api/events", params={"job": job["id"]}) as stream:
        found = views(stream)
    sampled = [view for view in found if view["preview"]]
    assert [view["step"] for view in sampled if view["state"] == "sampling"][:12] == list(range(1, 13))
    assert len({view["preview"] for view in sampled}) == 12 and all(view["steps"] == 12 for view in sampled)
    assert all(view["preview"].startswith("data:image/") for view in sampled)
    assert found[-1]["state"] == "finished" and found[-1]["preview"] is None and len(found[-1]["images"]) == 1
    monkeypatch.setattr(server.jobs, "_run", run)
    job = server.submit(steps=100)
    with server.client.stream("GET", "/api/events", params={"job": job["id"], "interval": 0.5}) as stream:
        joined = views(stream)
    assert len(joined) < 50 and joined[-1]["images"]


def test_a_seed_that_is_left_out_is_drawn_once_for_all_of_a_grid(server: Running) -> None:
    seeds = {server.submit()["request"]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    axes = {"x": {"setting": "steps", "values": [1, "2"]}, "y": {"setting": "prompt", "values": ["a dog", "a cat"]}}
    job = server.generate(**axes)
    *cells, grid = (server.client.get(f"/api/images/{image_id}").json() for image_id in job["images"])
    assert [(cell["settings"]["prompt"], cell["settings"]["steps"]) for cell in cells] == [
        ("a dog", 1),
        ("a dog", 2),
        ("a cat", 1),
        ("a cat", 2),
    ]
    assert len({cell["settings"]["seed"] for cell in cells}) == 1
    assert grid["kind"] == "grid" and grid["width"] > 2 * cells[0]["width"] and grid["height"] > 2 * cells[0]["height"]
    assert grid["settings"]["x"]["values"] == [1, "2"]


def test_words_that_no_caption_had_are_reported_as_txt2img_reports_them(server: Running) -> None:
    assert server.generate("a glorfindel <lora:x:1>")["warnings"] == [
        "words never seen in training: glorfindel, lora, x, 1",
        "prompt syntax that is not known here and is read as words: <lora:x:1>",
    ]
    assert "is far from the size of the training images" in server.generate(width=64, height=64)["warnings"][0]


def test_stop_keeps_what_the_last_preview_showed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    job = server.submit(steps=200, num_images=8, batch_size=1, seed=3)
    with server.client.stream("GET", "/api/events", params={"job": job["id"]}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and json.loads(line.removeprefix("data: "))["step"] >= 2:
                server.post(f"/api/jobs/{job['id']}/stop", {})
                break
    stopped = server.wait(job)
    assert stopped["state"] == "stopped" and len(stopped["images"]) < 8
    path = Path(f"out/{stopped['images'][-1]}.png")
    entry, record = server.client.get(f"/api/images/{path.stem}").json(), read_png(path)
    assert record.stopped_after is not None and entry["stopped_after"] == record.stopped_after < 200
    assert entry["film_steps"] == record.stopped_after  # the last frame is the last preview
    txt2img.main(["--reproduce", str(path), "--out", "again"])
    assert _pixels(Path("again/00000.png").read_bytes()) == _pixels(path.read_bytes())


def test_skip_leaves_out_an_image_and_a_job_that_waits_is_cancelled(server: Running) -> None:
    job = server.submit(steps=200, num_images=3, batch_size=1)
    waiting = server.submit()
    assert server.post(f"/api/jobs/{waiting['id']}/stop", {}).json()["state"] == "stopped"
    with server.client.stream("GET", "/api/events", params={"job": job["id"]}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and json.loads(line.removeprefix("data: "))["step"]:
                server.post(f"/api/jobs/{job['id']}/skip", {})
                break
    ended = server.wait(job)
    assert ended["state"] == "finished" and len(ended["images"]) == 2 and ended["step"] == ended["steps"] == 600
    assert server.wait(waiting)["images"] == []


def test_an_upload_is_changed_under_a_mask(server: Running) -> None:
    image, mask = plain((0, 128, 255), (16, 16)), Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    ids = {name: server.upload(encoded(one)).json()["id"] for name, one in (("image", image), ("mask", mask))}
    job = server.generate(**ids, strength=1)
    result = Image.open(io.BytesIO(server.client.get(f"/api/images/{job['images'][0]}/file").content))
    assert result.crop((8, 0, 16, 16)).getextrema() == image.crop((8, 0, 16, 16)).getextrema()
    assert result.crop((0, 0, 8, 16)).getextrema() != image.crop((0, 0, 8, 16)).getextrema()
    wider = server.generate(image=ids["image"], outpaint=[0, 0, 16, 0])
    assert server.client.get(f"/api/images/{wider['images'][0]}").json()["width"] == 32
    again = server.generate(image=wider["images"][0])  # an image of the history, whose copy becomes an upload
    assert server.client.get(f"/api/uploads/{again['request']['image']}").status_code == 200


def test_a_generated_png_brings_its_settings_back(server: Running) -> None:
    source = server.upload(encoded(plain((9, 9, 9), (16, 16)))).json()["id"]
    asked = {"steps": 3, "seed": 4, "num_images": 2, "image": source, "strength": 0.5, "timesteps": "1,0.5,0.2"}
    for settings in (asked | {"variation_seed": 8}, {"guidance": {"method": "apg", "interval": [0.1, 0.9]}}):
        job = server.generate("a dog", **settings)
        data = server.client.get(f"/api/images/{job['images'][-1]}/file").content
        uploaded = server.upload(data).json()
        assert uploaded["notes"] == []
        again = server.generate(**uploaded["settings"])
        assert _pixels(server.client.get(f"/api/images/{again['images'][0]}/file").content) == _pixels(data)
    grid = server.generate(x={"setting": "seed", "values": [1, 2]})
    data = server.client.get(f"/api/images/{grid['images'][-1]}/file").content
    assert server.upload(data).json()["settings"] == grid["request"]
    assert server.upload(encoded(plain())).json()["settings"] is None


def test_settings_of_another_machine_are_used_as_far_as_they_go(server: Running, here: Path) -> None:
    source = server.upload(encoded(plain((9, 9, 9), (16, 16)))).json()["id"]
    job = server.generate(image=source)
    data = server.client.get(f"/api/images/{job['images'][0]}/file").content
    (here / f"out/inputs/{source}.png").unlink()
    shutil.move(here / "runs/mine", here / "runs/other")
    uploaded = server.upload(data).json()
    assert uploaded["notes"] == [
        "model runs/mine/model is not here: choose another",
        "the image that it was made with is not here: add image and mask again",
    ]
    assert uploaded["settings"]["model"] is uploaded["settings"]["image"] is None


def test_the_history_survives_a_restart_and_a_line_that_was_cut_off(here: Path) -> None:
    with running_server(out=Path("out")) as server:
        made = [server.generate(prompt)["images"][0] for prompt in ("a dog", "a cat", "a red circle")]
    with Path("out/history.jsonl").open("a") as file:
        file.write('{"id": "20')
    with running_server(out=Path("out")) as server:
        made += server.generate("a dog\u2028of two lines")["images"]
    with running_server(out=Path("out")) as server:
        newest, *found = server.client.get("/api/images").json()
        assert newest["id"] == made.pop() and newest["settings"]["prompt"] == "a dog\u2028of two lines"
        assert [entry["id"] for entry in found] == made[::-1]
        assert found[1]["settings"]["prompt"] == "a cat"
        older = server.client.get("/api/images", params={"before": made[1], "limit": 1}).json()
        assert [entry["id"] for entry in older] == [made[0]]
        for part, kind in (("file", "png"), ("thumbnail", "png"), ("film", "jpeg")):
            answer = server.client.get(f"/api/images/{made[0]}/{part}")
            assert answer.headers["content-type"] == f"image/{kind}" and Image.open(io.BytesIO(answer.content)).load()
        film = Image.open(io.BytesIO(server.client.get(f"/api/images/{made[0]}/film").content))
        assert film.width % found[0]["film_steps"] == 0


def test_a_job_that_fails_says_why_and_the_next_one_runs(server: Running, here: Path) -> None:
    wrong = server.wait(server.submit(timesteps="leading", sampler="unipc"))
    assert wrong["state"] == "failed" and "never reaches t = 1" in wrong["error"]
    assert "must be multiples of" in server.wait(server.submit(width=17))["error"]
    answer = server.post("/api/jobs", {"prompt": "a dog", "model": "../elsewhere"})
    assert answer.json()["error"] == "model ../elsewhere is not below models/ or runs/: choose one of the list"
    server.generate()


def test_models_are_those_below_two_folders(here: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, here / "models/shared")
    shutil.copytree(tiny_model, here / "elsewhere/model")
    (here / "models/file.safetensors").touch()
    (here / "models/pickle.ckpt").touch()
    shipped = str(ROOT / "models/characters")
    assert find_models().keys() == {"runs/mine/model", "models/shared", "models/file.safetensors", shipped}
    with running_server(model=Path("elsewhere/model")) as server:
        listed = server.client.get("/api/session").json()["models"]
        assert listed[0]["name"] == "elsewhere/model" and listed[0]["resolution"] == 16
        job = server.generate()
        assert read_png(Path(f"outputs/page/{job['images'][0]}.png")).model == "elsewhere/model"


def test_a_damaged_model_does_no_harm_to_others(here: Path) -> None:
    for name, text in (("broken", "{"), ("odd", '{"kind": "pipeline", "metadata": {"steps": "many"}}')):
        (here / f"runs/{name}/model").mkdir(parents=True)
        (here / f"runs/{name}/model/model.json").write_text(text)
    with running_server(out=Path("out")) as server:  # which loads a damaged one first
        names = [model["name"] for model in server.client.get("/api/session").json()["models"]]
        assert {"runs/broken/model", "runs/odd/model", "runs/mine/model"} <= set(names)
        assert "damaged" in server.wait(server.submit(model="runs/broken/model"))["error"]
        server.generate(model="runs/mine/model")


def test_a_link_that_leads_nowhere_is_no_model(here: Path) -> None:
    (here / "models").mkdir()
    (here / "models/gone.safetensors").symlink_to(here / "nowhere")
    assert "models/gone.safetensors" not in find_models()


def test_steps_of_the_model_beyond_the_limit_are_refused_before_sampling(server: Running, here: Path) -> None:
    manifest = json.loads((here / "runs/mine/model/model.json").read_text())
    manifest["metadata"]["steps"] = 300
    (here / "runs/mine/model/model.json").write_text(json.dumps(manifest))
    os.utime(here / "runs/mine/model/unet.safetensors")  # so that it is loaded again
    request = {"prompt": "a dog"}
    job = server.wait(server.post("/api/jobs", request).json())
    assert job["state"] == "failed" and "steps: Input should be less than or equal to 200" in job["error"]
    assert job["step"] == 0


def test_a_model_that_changed_is_loaded_again(server: Running, here: Path) -> None:
    server.generate()
    weights = here / "runs/mine/model/unet.safetensors"
    weights.write_bytes(b"x" * 9)
    assert server.wait(server.submit())["state"] == "failed"


def test_what_nobody_expected_is_said_and_the_next_job_runs(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [
        (RuntimeError("CUDA out of memory. Tried"), "out of memory: choose"),
        (KeyError("x"), "unexpected KeyError"),
    ]
    for error, message in errors:
        with monkeypatch.context() as patch:
            patch.setattr(server.jobs, "_run", _raiser(error))
            assert message in server.wait(server.submit())["error"]
    server.generate()


def test_an_error_while_the_first_model_is_loaded_ends_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ldm.server.runner.ModelRunner.load_first", _raiser(RuntimeError("out of memory")))
        with running_server(out=Path("out")) as server:
            server.generate()


def test_a_skip_does_not_undo_a_stop(server: Running) -> None:
    job = server.submit(steps=200, num_images=8, batch_size=1)
    for action in ("stop", "skip"):
        server.post(f"/api/jobs/{job['id']}/{action}", {})
    assert server.wait(job)["state"] == "stopped"


def test_the_stream_of_a_job_that_has_ended_ends_at_once(server: Running) -> None:
    job = server.generate()
    assert server.wait(job)["images"] == job["images"]
    assert server.client.get("/api/events", params={"job": "none"}).status_code == 404


def test_clear_pixels_of_a_mask_stay(server: Running) -> None:
    mask = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    headers = {TOKEN_HEADER: server.access.token}
    files = {"file": ("mask.png", encoded(mask))}
    answer = server.client.post("/api/uploads", files=files, data={"kind": "mask"}, headers=headers).json()
    stored = Image.open(io.BytesIO(server.client.get(f"/api/uploads/{answer['id']}").content))
    assert stored.getextrema() == ((0, 0),) * 3


def test_metadata_that_cannot_be_used_leave_the_image(server: Running) -> None:
    for texts, note in (
        ({"ldm": '{"version": 1}'}, "it was made by an older version of ldm"),
        ({"ldm": "[" * 100_000}, "its settings cannot be used here"),
        ({"ldm_grid": '{"prompt": "a", "steps": 999}'}, "steps: Input should be less than or equal to 200"),
    ):
        info = PngInfo()
        for key, text in texts.items():
            info.add_itxt(key, text)
        uploaded = server.upload(encoded(plain(), pnginfo=info)).json()
        assert uploaded["settings"] is None and note in uploaded["notes"][0] and uploaded["id"]


# Safety.


def test_it_listens_on_this_machine_alone_under_literal_names(server: Running) -> None:
    assert addresses(None) == {"127.0.0.1", "localhost", "::1"}
    port = server.access.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
        assert server.client.get("/", headers={"Host": host}).status_code == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1:{port + 1}",
        "127.0.0.1",
        f"localhost.:{port}",
        "",
    ):
        answer = server.client.get("/api/session", headers={"Host": host})
        assert answer.status_code == 403 and "is not an address of this server" in answer.json()["error"]
    own = [one.laddr for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert [address.ip for address in own if address.port == port] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        ({}, 201, None),
        ({"Origin": "http://127.0.0.1:{port}"}, 201, None),
        ({"Content-Type": "application/json; charset=utf-8"}, 201, None),
        ({"Origin": "null"}, 403, "the origin is not this server"),
        ({"Origin": "http://evil.example"}, 403, "the origin is not this server"),
        ({"Origin": "http://localhost:{port}"}, 403, "the origin is not this server"),
        ({"Origin": "https://127.0.0.1:{port}"}, 403, "the origin is not this server"),
        ({"Sec-Fetch-Site": "cross-site"}, 403, "another site's page may not ask"),
        ({"Sec-Fetch-Site": "same-site"}, 403, "another site's page may not ask"),
        ({TOKEN_HEADER: ""}, 403, "must be the token of this server: reload the page"),
        ({TOKEN_HEADER: "wrong"}, 403, "must be the token of this server: reload the page"),
        ({"Content-Type": "text/plain"}, 415, "the content type must be application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "the content type must be application/json"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415, "the content type must be application/json"),
    ],
)
def test_what_a_foreign_page_could_send_is_refused(
    shared: Running, headers: dict[str, str], status: int, reason: str | None
) -> None:
    own = {TOKEN_HEADER: shared.access.token, "Content-Type": "application/json"}
    given = {name: value.format(port=shared.access.port) for name, value in headers.items()}
    before = shared.jobs._count
    answer = shared.client.post("/api/jobs", content='{"prompt": "a dog", "steps": 1}', headers=own | given)
    assert answer.status_code == status and (reason is None or reason in answer.json()["error"]), answer.text
    assert shared.jobs._count - before == (status == 201)


def test_other_methods_and_other_sites_are_refused(server: Running) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
        assert server.client.request(method, "/api/jobs").status_code == 405
    answer = server.client.get("/api/session", headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403 and "token" not in answer.json()
    upload = server.post("/api/uploads", {"file": "x"})
    assert upload.status_code == 415 and "multipart/form-data" in upload.json()["error"]
    files = {"file": ("a.png", encoded(plain()))}
    assert server.client.post("/api/uploads", files=files).status_code == 403
    assert (
        "access-control-allow-origin" not in server.client.get("/", headers={"Origin": "http://evil.example"}).headers
    )


def test_only_files_that_it_wrote_are_served_by_id(server: Running, here: Path) -> None:
    made = server.generate()["images"][0]
    uploaded = server.upload(encoded(plain())).json()["id"]
    (here / "out/secret.png").write_bytes(encoded(plain()))
    (here / "out/inputs" / f"{'0' * 64}.png").write_bytes(encoded(plain()))  # not what its name says
    ids = [
        "secret",
        "inputs/" + uploaded,
        "..",
        "../out/" + made,
        "%2e%2e%2fhistory",
        "..%2Fout%2F" + made,
        "%00",
        made + "-film",
    ]
    for wrong in ids:
        for path in (f"/api/images/{wrong}/file", f"/api/images/{wrong}/film", f"/api/images/{wrong}/thumbnail"):
            assert server.client.get(path).status_code == 404, path
    for wrong in ("0" * 64, made, "../history", "..%2Fhistory", uploaded.upper()):
        assert server.client.get(f"/api/uploads/{wrong}").status_code == 404, wrong
    for path in ("/out/history.jsonl", "/page.py", "/static/page.js", "/../pyproject.toml", "/%2e%2e/app.py"):
        assert server.client.get(path).status_code == 404, path
    (here / "out/inputs" / f"{uploaded}.png").write_bytes(b"<svg onload=alert(1)>")
    assert server.client.get(f"/api/uploads/{uploaded}").status_code == 404
    answer = server.post("/api/jobs", {"prompt": "a dog", "image": "../../etc/passwd"})
    assert answer.status_code == 422 and answer.json()["error"] == "image ../../etc/passwd is not here: upload it again"


def test_every_answer_says_what_a_browser_may_do_with_it(server: Running) -> None:
    made = server.generate()["images"][0]
    paths = [
        "/",
        "/page.js",
        "/page.css",
        "/docs",
        "/openapi.json",
        "/api/session",
        f"/api/images/{made}/file",
        "/nothing",
    ]
    for path in paths:
        headers = server.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy, path
        assert "'unsafe-inline'" not in policy or path == "/docs"
        assert "script-src 'unsafe" not in policy and "unsafe-eval" not in policy
    refused = server.client.get("/", headers={"Host": "evil.example"}).headers
    assert refused["x-content-type-options"] == "nosniff"
    page = server.client.get("/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", page)
    for text in (page, server.client.get("/page.js").text, server.client.get("/page.css").text):
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_the_api_is_documented_by_a_page_without_foreign_files(server: Running) -> None:
    docs = server.client.get("/docs").text
    assert not re.search(r"(src|href)=\"(?!/docs/|data:)", docs)
    for path in re.findall(r"\"(/docs/[^\"]+)\"", docs):
        assert server.client.get(path).status_code == 200
    api = server.client.get("/openapi.json").json()
    assert {"/api/jobs", "/api/events", "/api/uploads", "/api/images/{image_id}/file"} <= api["paths"].keys()
    assert all(operation["description"] for path in api["paths"].values() for operation in path.values())
    assert "GenerationRequest" in api["components"]["schemas"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prompt": " "}, "prompt is empty: say what to generate"),
        ({"prompt": "a" * 4001}, "prompt: String should have at most 4000 characters"),
        ({"prompt": 5}, "prompt: Input should be a valid string"),
        ({"steps": 201}, "steps: Input should be less than or equal to 200"),
        ({"width": 4096}, "width: Input should be less than or equal to 2048"),
        ({"num_images": 65}, "num_images: Input should be less than or equal to 64"),
        ({"batch_size": 9}, "batch_size: Input should be less than or equal to 8"),
        ({"guidance_scale": "nan"}, "guidance_scale: "),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"sampler": "eular"}, "sampler 'eular' is unknown: choose one of ddpm"),
        ({"stepz": 1}, "stepz: unknown key; perhaps you meant steps"),
        ({"guidance": {"rescal": 1}}, "guidance.rescal: unknown key; perhaps you meant rescale"),
        ({"timesteps": "1,x"}, "timesteps '1,x' is not a list of numbers"),
        ({"timesteps": "karas"}, "timesteps 'karas' are unknown: choose one of trailing"),
        ({"seed": 2**53 - 2, "num_images": 3}, "seed and variation_seed with num_images go beyond"),
        ({axis: {"setting": "steps", "values": [1]} for axis in ("x", "y")}, "both axes vary steps"),
        ({"x": {"setting": "strength", "values": [1]}}, "an axis of strength needs an image to start from"),
        (
            {"x": {"setting": "variation_strength", "values": [1]}},
            "an axis of variation_strength needs a variation_seed",
        ),
        ({"mask": "x"}, "mask, inversion_prompt and outpaint need an image to start from"),
        ({"x": {"setting": "model", "values": [1]}}, "x.setting: Input should be 'prompt'"),
        ({"x": {"setting": "steps", "values": []}}, "x.values: Tuple should have at least 1 item"),
        ({"x": {"setting": "steps", "values": list(range(1, 10))}}, "x.values: Tuple should have at most 8 items"),
        ({"x": {"setting": "steps", "values": [1, 500]}}, "steps: Input should be less than or equal to 200"),
        ({"x": {"setting": "steps", "values": [1]}, "num_images": 2}, "a grid has one image for each combination"),
    ],
)
def test_limits_are_said_in_one_line(shared: Running, settings: dict[str, object], reason: str) -> None:
    before = shared.jobs._count
    answer = shared.post("/api/jobs", {"prompt": "a dog", **settings})
    assert answer.status_code == 422 and reason in answer.json()["error"]
    assert len(answer.json()["error"].splitlines()) == 1 and shared.jobs._count == before


def test_bodies_and_uploads_have_a_limit(server: Running) -> None:
    answer = server.post("/api/jobs", {"prompt": "a" * 10_000_000})
    assert answer.status_code == 413 and answer.json()["error"] == "larger than 65,536 bytes, which is the limit here"
    assert server.upload(b"x" * (guard.MAX_UPLOAD + 1)).status_code == 413
    headers = {TOKEN_HEADER: server.access.token, "Content-Type": "application/json"}
    chunked = server.client.post("/api/jobs", content=iter([b"{}"]), headers=headers)
    assert chunked.status_code == 411
    with socket.create_connection(
        ("127.0.0.1", server.access.port)
    ) as raw:  # two lengths, of which a server believes one
        lines = [f"Host: 127.0.0.1:{server.access.port}", f"{TOKEN_HEADER}: {server.access.token}", "Connection: close"]
        lines += ["Content-Type: application/json", "Content-Length: 2", "Transfer-Encoding: chunked"]
        raw.sendall("\r\n".join(["POST /api/jobs HTTP/1.1", *lines, "", "2", "{}", "0", "", ""]).encode())
        assert re.match(rb"HTTP/1.1 4(00|11)", raw.recv(100))
    assert server.client.post("/api/jobs", content=b"{", headers=headers).status_code == 422
    surrogate = server.client.post("/api/jobs", content=rb'{"prompt": "\ud800"}', headers=headers)
    assert surrogate.status_code == 422


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "not a PNG, JPEG or WEBP image"),
        (b"GIF89a" + bytes(20), "not a PNG, JPEG or WEBP image"),
        (b"", "not a PNG, JPEG or WEBP image"),
        (encoded(plain())[:40], ""),
        (encoded(Image.new("1", (5_000, 5_000))), "larger than 16 megapixels, which is the limit here: shrink it"),
        (encoded(Image.new("1", (20_000, 20_000))), "larger than the limit of 64 megapixels; shrink it"),
    ],
)
def test_what_is_no_usable_image_is_refused(shared: Running, data: bytes, reason: str) -> None:
    before = _rss()
    answer = shared.upload(data)
    assert answer.status_code == 422 and reason in answer.json()["error"] and answer.json()["error"]
    assert not list((shared.history.folder / "inputs").iterdir()) and _rss() - before < 100 * 2**20


def test_an_upload_is_written_anew_without_what_was_in_it(server: Running, here: Path) -> None:
    data = encoded(plain(), "PNG") + b"<script>alert(1)</script>"
    uploaded = server.upload(data, "../../evil.html").json()
    assert [path.name for path in (here / "out/inputs").iterdir()] == [f"{uploaded['id']}.png"]
    stored = server.client.get(f"/api/uploads/{uploaded['id']}").content
    assert b"script" not in stored and sha256(here / f"out/inputs/{uploaded['id']}.png") == uploaded["id"]


def test_an_image_to_start_from_is_resized_within_the_limit(server: Running) -> None:
    tall = server.upload(encoded(plain(size=(16, 2000)))).json()["id"]
    for settings in ({"image": tall, "width": 2048}, {"image": tall, "outpaint": [0, 1024, 0, 1024]}):
        job = server.wait(server.submit(**settings))
        assert job["state"] == "failed" and "beyond 2048 pixels: choose a smaller width and height" in job["error"]


def test_every_error_is_json_with_the_same_headers(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.jobs, "live", _raiser(KeyError("x")))
    for path, status in (("/nothing", 404), ("/api/images?limit=0", 422), ("/api/jobs", 500)):
        answer = server.client.get(path)
        assert answer.status_code == status and answer.json()["error"]
        assert answer.headers["x-content-type-options"] == "nosniff" and "content-security-policy" in answer.headers


def test_a_full_queue_is_said(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_QUEUE", 3)
    long = [server.submit(steps=200, num_images=64) for _ in range(3)]
    answer = server.post("/api/jobs", {"prompt": "a dog"})
    assert answer.status_code == 429 and answer.json()["error"].startswith("3 jobs wait already")
    server.post(f"/api/jobs/{long[2]['id']}/stop", {})
    server.submit()


def test_others_need_the_token_that_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_server(listen="0.0.0.0") as server:
        assert {"127.0.0.1", "localhost"} <= addresses("0.0.0.0") and addresses("192.0.2.7") == {"192.0.2.7"}
        assert "::1" in addresses("::") and not [one for one in addresses("::") if "%" in one]
        for path in ("/", "/page.js", "/api/session", "/api/images", "/docs", "/?token=wrong"):
            answer = server.client.get(path)
            assert answer.status_code == 403 and "open the address that the server printed" in answer.json()["error"]
        answer = server.client.get("/", params={"token": server.access.token})
        assert answer.status_code == 303 and answer.headers["location"] == "/"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
        assert server.client.get("/api/session").status_code == 200  # by the cookie
        assert server.client.post("/api/jobs", json={"prompt": "a dog"}).status_code == 403  # which is not enough
        server.generate()
    with running_server(listen="0.0.0.0") as server:
        assert server.client.get("/api/session", headers={TOKEN_HEADER: server.access.token}).status_code == 200


def test_listen_warns_and_prints_the_address(here: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/serve.py"), "--port", "0", "--listen", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}\n", line)
        assert "whoever reads this address can generate here" in process.stderr.readline()
        assert httpx.get(line.strip(), follow_redirects=True).status_code == 200
        process.terminate()
    assert process.returncode in (0, -signal.SIGTERM)


# Many clients, and the end.


def test_two_hundred_jobs_of_eight_clients_are_neither_lost_nor_mixed_up(server: Running, here: Path) -> None:
    for _ in range(20):
        server.generate()
    before = _rss()

    def client(number: int) -> list[tuple[str, int, dict[str, object]]]:
        asked = []
        for index in range(25):
            prompt = f"client {number} job {index}"
            asked.append((prompt, 100 * number + index, server.submit(prompt, steps=1, seed=100 * number + index)))
        return [(prompt, seed, server.wait(job)) for prompt, seed, job in asked]

    with ThreadPoolExecutor(8) as pool:
        results = [result for found in pool.map(client, range(8)) for result in found]
    assert len(results) == 200
    images = set()
    for prompt, seed, job in results:
        assert job["state"] == "finished" and job["request"]["prompt"] == prompt
        (image_id,) = job["images"]
        record = read_png(here / f"out/{image_id}.png")
        assert (record.prompt, record.seed) == (prompt, seed)
        images.add(image_id)
    assert len(images) == 200 and not server.jobs.live() and not server.jobs.events._listeners
    assert _rss() - before < 64 * 2**20
    for _ in range(60):
        server.submit(steps=1)
    _until(lambda: not server.jobs.live())
    assert len(server.jobs._ended) == jobs.MAX_ENDED < 20 + 200 + 60


def test_a_client_that_goes_away_frees_its_place(server: Running) -> None:
    streams = [httpx.Client(base_url=server.url) for _ in range(MAX_LISTENERS)]
    answers = [client.send(client.build_request("GET", "/api/events"), stream=True) for client in streams]
    assert all(answer.status_code == 200 for answer in answers)
    _until(lambda: len(server.jobs.events._listeners) == MAX_LISTENERS)
    full = server.client.get("/api/events")
    assert full.status_code == 503 and full.json()["error"] == "too many clients listen: close a tab"
    for client in streams:
        client.close()
    _until(lambda: not server.jobs.events._listeners)
    server.generate()


def test_a_second_client_finds_the_running_job(server: Running) -> None:
    job = server.submit("a dog", steps=200, num_images=64)
    with httpx.stream("GET", f"{server.url}/api/events") as stream:
        line = next(line for line in stream.iter_lines() if line.startswith("data: "))
    view = json.loads(line.removeprefix("data: "))
    assert view["id"] == job["id"] and view["request"]["prompt"] == "a dog"
    assert [one["id"] for one in server.client.get("/api/jobs").json()] == [job["id"]]
    assert server.client.get(f"/api/jobs/{job['id']}").json()["id"] == job["id"]
    assert server.client.get("/api/jobs/none").status_code == 404


def test_sigterm_ends_within_a_step_and_loses_no_image(here: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/serve.py"), "--port", "0", "--out", "out", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx.Client(base_url=url, timeout=60) as client:
            token = {TOKEN_HEADER: client.get("/api/session").json()["token"]}
            asked = {"prompt": "a dog", "steps": 20, "num_images": 64, "batch_size": 1}
            job = client.post("/api/jobs", json=asked, headers=token).json()
            waiting = client.post("/api/jobs", json=asked, headers=token).json()
            with client.stream("GET", "/api/events") as stream:
                lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: "))
                found = map(json.loads, lines)
                next(view for view in found if len(view["images"]) >= 2)
                process.send_signal(signal.SIGTERM)
                last = list(found)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]
    assert all(view["state"] == "sampling" for view in last if view["id"] == job["id"])  # it did not run to its end
    assert waiting["state"] == "queued"
    entries = History(here / "out").entries(limit=100)
    assert 2 <= len(entries) < 64
    assert {entry.id for entry in entries} == {path.stem for path in (here / "out").glob("*.png")}
    for entry in entries:
        Image.open(here / f"out/{entry.id}.png").load()


# The command.


def test_what_cannot_be_served_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"127\.0\.0\.1:{port} cannot be listened on \(.*\): pass another --port"):
            serve.main(["--port", str(port)])
    with pytest.raises(SystemExit, match="--listen my-machine is no IP address: pass one of this machine, or 0.0.0.0"):
        serve.main(["--listen", "my-machine"])
    with pytest.raises(SystemExit, match="nowhere does not exist: pass a model folder"):
        serve.main(["--model", "nowhere"])
    with pytest.raises(SystemExit, match="203.0.113.1:7860 cannot be listened on .* an address of this machine"):
        serve.main(["--listen", "203.0.113.1"])
    Path("file").touch()
    with pytest.raises(SystemExit, match="--out file is a file: pass a folder that can be written"):
        serve.main(["--out", "file"])
    monkeypatch.setattr("ldm.server.runner.SHIPPED_MODEL", here / "none")
    shutil.rmtree("runs")
    with pytest.raises(SystemExit, match="no model below runs/ or models/: run `make demo` first, or pass --model"):
        serve.main([])


def test_a_missing_package_is_said(here: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; sys.path.insert(0, sys.argv.pop(1)); import serve"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "scripts")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: fastapi is not installed: run `pip install 'ldm[web]'`"


def test_the_example_of_the_readme(server: Running, here: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import json, urllib.*?)```", readme, re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:7860", server.url)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step" in done.stdout and Image.open(here / "image.png").size == (16, 16)


def test_every_setting_of_txt2img_that_a_page_may_change_is_in_a_request() -> None:
    local = {
        "prompts",
        "prompt_file",
        "model",
        "out",
        "guide_model",
        "preview",
        "device",
        "precision",
        "compile",
        "reproduce",
        "config",
    }
    own = set(GenerationRequest.model_fields) - {
        "prompt",
        "model",
        "image",
        "mask",
        "strength",
        "inversion_prompt",
        "outpaint",
        "x",
        "y",
    }
    assert own == set(Txt2ImgConfig.model_fields) - local


def _in_step(run: Run, events: Events) -> Run:
    """It waits for a client, and after each change until the client has been sent it."""

    def run_in_step(job: Job, changed: Callable[[], None]) -> None:
        _until(lambda: bool(events._listeners))

        def changed_and_sent() -> None:
            changed()
            time.sleep(0.01)
            _until(lambda: not any(listener._pending for listener in events._listeners))

        run(job, changed_and_sent)

    return run_in_step


def _raiser(error: Exception) -> Callable[..., None]:
    def action(*args: object, **kwargs: object) -> None:
        raise error

    return action


def _pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.tobytes()


def _rss() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
