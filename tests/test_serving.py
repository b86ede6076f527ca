"""The server without Ray: its images, its queue, its API, and whom it refuses."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import io
import json
import threading
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import tiny
import torch
from job import job
from PIL import Image
from served import NAMES, application, exported, page, student, teacher
from starlette.testclient import TestClient

from fewstep.config import validate
from fewstep.diffusion.draws import Draws, Joined
from fewstep.page import render
from fewstep.serving.app import BODY_BYTES, Application
from fewstep.serving.generator import About, Generator, ImageRequest, ImageResult, name_of, open_beside, open_student
from fewstep.serving.meter import Meter, quantile
from fewstep.serving.queue import Busy, Queue
from fewstep.serving.settings import Settings, check, token_digest

ABOUT = About("two", "student", "class", (16, 16), "few-step-2", 2, 10, NAMES)
TOKEN = "a-token-of-thirty-two-characters"
DRAWN = ImageResult((b"png",), 0.01, 1)


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def generator(export) -> Generator:
    return student(export)


class Stub:
    """A model that answers at once, or raises."""

    def __init__(self, answer: ImageResult | Exception = DRAWN, seconds: float = 0.0, about: About = ABOUT):
        self.about, self.answer, self.seconds, self.asked = about, answer, seconds, []

    async def draw(self, ask: ImageRequest) -> ImageResult:
        self.asked.append(ask)
        await asyncio.sleep(self.seconds)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def client(*models: Any, token: str | None = None, host: str = "127.0.0.1:8000", **options: Any) -> TestClient:
    digest = None if token is None else hashlib.sha256(token.encode()).digest()
    app = Application(models or [Stub()], "<p>page</p>", token=digest, **options)
    return TestClient(app.asgi, base_url=f"http://{host}", raise_server_exceptions=False)


def post(http: TestClient, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return http.post("/v1/images/generations", json={"prompt": "3"} | body, headers=headers)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def received(answer: Any) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [pixels(base64.b64decode(image["b64_json"])) for image in answer.json()["data"]]


# The images


def test_the_images_of_a_seed_are_those_of_the_sample_job(export, generator, tmp_path):
    arguments = [f"model={export}", "images=5", "labels=3", "seed=7", f"out={tmp_path / 'grid.png'}"]
    job("sample")([*arguments, f"each={tmp_path / 'each'}"])
    wanted = [pixels(path.read_bytes()) for path in sorted((tmp_path / "each").iterdir())]
    with TestClient(application(generator).asgi, base_url="http://localhost") as http:
        answer = post(http, prompt="dress", n=5, seed=7)
        assert np.array_equal(received(answer), wanted) and np.std(wanted[0]) > 10
        assert not np.array_equal(received(post(http, prompt="dress", n=5, seed=8)), wanted)
    assert answer.json() | {"created": 0, "data": [], "seconds": 0} == {
        **{"created": 0, "data": [], "output_format": "png", "size": "16x16", "model": "two", "seed": 7},
        **{"seconds": 0, "drawn_together": 5},
    }


def test_requests_that_are_drawn_together_get_their_own_images(generator):
    asks = [ImageRequest(3, 7, label=3), ImageRequest(1, 0, label=9), ImageRequest(4, 7, label=1)]
    alone = [generator.draw([ask])[0] for ask in asks]
    together = generator.draw(asks)
    assert [drawn.together for drawn in together] == [8, 8, 8]
    for a, b in zip(alone, together, strict=True):
        off = np.abs(np.int16([pixels(p) for p in a.pngs]) - np.int16([pixels(p) for p in b.pngs]))
        assert off.max() <= 1 and np.mean(off > 0) < 1e-2  # float32 adds up in another order


def test_joined_draws_are_those_of_each_alone():
    parts = (Draws(1, 0), 2), (Draws(5, 0), 1)
    joined = Joined(parts).normal("z", (3, 4))
    assert torch.equal(joined, torch.cat([draws.normal("z", (count, 4)) for draws, count in parts]))


def test_a_teacher_is_drawn_in_the_steps_that_are_asked_for():
    generator = teacher()
    assert (generator.about.sampler, generator.about.steps, generator.about.role) == ("heun-3", 3, "teacher")
    [three], [again], [five] = (generator.draw([ImageRequest(1, 0, label=0, steps=steps)]) for steps in (None, 3, 5))
    assert three.pngs == again.pngs != five.pngs


def test_a_model_of_texts_draws_for_a_prompt(tmp_path):
    folder = tiny.pipeline("sd15", tmp_path / "sd15")
    arguments = [f"model={folder}", "images=2", "steps=2", "seed=3", "prompts=a red heart"]
    job("sample")([*arguments, f"out={tmp_path / 'grid.png'}", f"each={tmp_path / 'each'}"])
    wanted = [path.read_bytes() for path in sorted((tmp_path / "each").iterdir())]
    generator = open_student(Settings(model=str(folder), steps=2))
    assert (generator.about.name, generator.about.takes, generator.about.role) == ("sd15", "text", "teacher")
    one, other = (generator.draw([ImageRequest(2, 3, text=text)])[0].pngs for text in ("a red heart", "a dog"))
    assert list(one) == wanted and other != one


# The queue


class Slow:
    """A generator whose batches wait to be let go."""

    def __init__(self) -> None:
        self.go, self.batches = threading.Semaphore(0), []

    def __call__(self, asks: list[ImageRequest]) -> list[ImageResult]:
        self.batches.append([(ask.seed, ask.images) for ask in asks])
        assert self.go.acquire(timeout=10)
        if any(ask.seed == 666 for ask in asks):
            raise ArithmeticError
        return [ImageResult((b"%d" % ask.seed,) * ask.images, 0.1, 1) for ask in asks]


async def started(queue: Queue, *asks: ImageRequest) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(queue.draw(ask)) for ask in asks]
    await asyncio.sleep(0.01)
    return tasks


def test_what_waits_together_is_drawn_together_in_order_and_by_steps():
    async def body() -> None:
        slow = Slow()
        queue = Queue(ABOUT, slow, batch=4, limit=100)
        asks = [
            ImageRequest(1, 0),
            ImageRequest(2, 1),
            ImageRequest(2, 2),
            ImageRequest(1, 3),
            ImageRequest(1, 4, steps=9),
            ImageRequest(9, 5),
        ]
        tasks = await started(queue, *asks)
        slow.go.release(10)
        answers = await asyncio.gather(*tasks)
        assert [len(answer.pngs) for answer in answers] == [1, 2, 2, 1, 1, 9]
        assert [answer.pngs[0] for answer in answers] == [b"0", b"1", b"2", b"3", b"4", b"5"]
        assert slow.batches == [[(0, 1), (1, 2)], [(2, 2), (3, 1)], [(4, 1)], [(5, 9)]]
        assert (queue.images, queue.drawn) == (0, 16)

    asyncio.run(body())


def test_a_full_queue_says_when_to_come_again_and_those_who_leave_make_room():
    async def body() -> None:
        slow = Slow()
        queue = Queue(ABOUT, slow, batch=4, limit=5)
        first, second = await started(queue, ImageRequest(2, 0), ImageRequest(3, 1))
        with pytest.raises(Busy) as busy:
            await queue.draw(ImageRequest(1, 2))
        assert busy.value.retry_s == 1  # no speed is known yet
        second.cancel()
        await asyncio.sleep(0)
        (third,) = await started(queue, ImageRequest(3, 3))
        slow.go.release(10)
        assert [len((await task).pngs) for task in (first, third)] == [2, 3]
        assert slow.batches == [[(0, 2)], [(3, 3)]]  # nothing was drawn for the one who left
        queue.speed, queue.images = 0.5, 4
        with pytest.raises(Busy) as busy:
            await queue.draw(ImageRequest(2, 2))
        assert busy.value.retry_s == 8

    asyncio.run(body())


def test_a_batch_that_fails_fails_alone():
    async def body() -> None:
        slow = Slow()
        queue = Queue(ABOUT, slow, batch=4, limit=50)
        bad, good = [*await started(queue, ImageRequest(1, 666)), *await started(queue, ImageRequest(1, 1))]
        slow.go.release(10)
        with pytest.raises(ArithmeticError):
            await bad
        assert (await good).pngs == (b"1",) and queue.images == 0

    asyncio.run(body())


# The API


def test_models_are_listed_with_what_they_take():
    beside = dataclasses.replace(ABOUT, name="two-teacher", role="teacher", steps=18)
    http = client(Stub(), Stub(about=beside), images=9)
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["two", "two-teacher"]
    first = listed["data"][0]
    assert first == http.get("/v1/models/two").json()
    assert (first["size"], first["classes"], first["images"], first["owned_by"]) == ("16x16", 10, 9, "fewstep")
    assert http.get("/healthz").json() == {"status": "ok"}


def test_a_request_is_for_a_model_a_class_and_a_seed():
    beside = Stub(about=dataclasses.replace(ABOUT, name="two-teacher", role="teacher", steps=18))
    student, http = Stub(), None
    http = client(student, beside)
    for body in ({"prompt": 3}, {"prompt": "3"}, {"prompt": "dress"}, {"prompt": "Dress", "model": "two"}):
        assert post(http, seed=5, n=2, size="16x16", response_format="b64_json", user="me", **body).status_code == 200
    assert student.asked == [ImageRequest(2, 5, label=3)] * 4
    seeds = {post(http).json()["seed"] for _ in range(3)}
    assert len(seeds) == 3 and {ask.seed for ask in student.asked[4:]} == seeds
    assert post(http, model="two-teacher", steps=4, size="auto").status_code == 200
    assert beside.asked[0].steps == 4
    nothing = Stub(about=dataclasses.replace(ABOUT, takes="nothing", classes=None, class_names=()))
    texts = Stub(about=dataclasses.replace(ABOUT, takes="text", classes=None, class_names=()))
    assert post(client(nothing), prompt="", seed=1).status_code == 200 and nothing.asked == [ImageRequest(1, 1)]
    assert post(client(texts), prompt="a <b> & c", seed=1).status_code == 200
    assert texts.asked == [ImageRequest(1, 1, text="a <b> & c")]
    assert post(client(nothing), prompt="x").json()["error"]["param"] == "prompt"
    assert post(client(texts), prompt="  ").json()["error"]["param"] == "prompt"
    assert post(client(texts), prompt="x" * 4001).json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"n": 10_000}, "n", "n: 10000 images, but a request may ask for 16"),
        ({"n": 0}, "n", "n: must be at least 1, got 0"),
        ({"n": True}, "n", "n: expected a whole number, got true"),
        ({"n": "many"}, "n", "got 'many'"),
        ({"size": "1024x1024"}, "size", "this model makes 16x16"),
        ({"response_format": "url"}, "response_format", "b64_json only"),
        ({"steps": 4}, "steps", "this model is a student"),
        ({"seed": -1}, "seed", "seed: must be at least 0, got -1"),
        ({"seed": 10**30}, "seed", "seed"),
        ({"prompt": None}, "prompt", "prompt: expected"),
        ({"prompt": "10"}, "prompt", "'10' is no class; give a number from 0 to 9, or a name: T-shirt/top"),
        ({"prompt": "-1"}, "prompt", "is no class"),
        ({"prompt": "٣"}, "prompt", "is no class"),
        ({"prompt": "<script>alert(1)</script>"}, "prompt", "is no class"),
        ({"quality": "hd"}, "quality", "quality"),
    ],
)
def test_a_wrong_field_is_named(body, param, says):
    stub = Stub()
    answer = post(client(stub), **body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and says in error["message"]
    assert error["type"] == "invalid_request_error" and stub.asked == []
    assert answer.headers["content-type"] == "application/json"  # no browser takes a prompt in it for a page
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "/etc/passwd", "two/../../x", "models:/two@newest", "two\0"]
)
def test_the_name_of_a_model_is_never_a_path(name):
    answer = post(client(), model=name)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    for path in (f"/v1/models/{name}", f"/v1/models/{name.replace('/', '%2F').replace(chr(0), '%00')}"):
        assert client().get(path.replace("\0", "%00")).status_code == 404


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"{", b'{"n": NaN}', b'"' + b"x" * 100, b"\xff", b"[" * 50_000, b'{"prompt": Infinity}']
)
def test_a_body_that_is_no_object_is_refused(body):
    answer = client().post("/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_a_long_body_is_refused_before_it_is_read():
    read = []

    def chunks():
        for _ in range(1000):
            read.append(1)
            yield b" " * 4096

    http, kind = client(), {"Content-Type": "application/json"}
    assert http.post("/v1/images/generations", content=b" " * (BODY_BYTES + 1), headers=kind).status_code == 413
    lying = kind | {"Content-Length": "-5"}
    assert http.post("/v1/images/generations", content=b"{}", headers=lying).status_code == 413

    async def body() -> tuple[int, int]:  # the test client gathers a body before it sends it
        sent, taken = [], 0

        async def receive():
            nonlocal taken
            taken += 1
            return {"type": "http.request", "body": b" " * 4096, "more_body": True}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/images/generations", "query_string": b""}
        scope |= {"headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "root_path": ""}
        await Application([Stub()], "").asgi(scope, receive, send)
        return sent[0]["status"], taken

    assert asyncio.run(body()) == (413, BODY_BYTES // 4096 + 1)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_a_form_is_no_request(headers):
    assert client().post("/v1/images/generations", content=b'{"prompt": "3"}', headers=headers).status_code == 415


def test_paths_and_methods_that_are_not_there():
    http = client()
    assert http.get("/v1/images/generations").status_code == 405
    for path in ("/v1", "/docs", "/../jobs/serve.py", "/v1/images/edits", "/static/../../etc/passwd"):
        assert http.get(path).json()["error"]["code"] == "not_found"


def test_a_server_that_is_stopped_finishes_its_work():
    async def body() -> None:
        app = Application([Stub(seconds=0.1)], "")
        transport = httpx2.ASGITransport(app.asgi)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            ask = lambda: http.post("/v1/images/generations", json={"prompt": "3"})
            first = asyncio.create_task(ask())
            while not app.open:
                await asyncio.sleep(0.01)
            assert not await app.drain(0.0)
            refused = await ask()
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            assert await app.drain(10) and (await first).status_code == 200

    asyncio.run(body())


def test_busy_slow_and_broken_models():
    busy = post(client(Stub(Busy(7))))
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "7")
    assert busy.json()["error"]["code"] == "rate_limit_exceeded"
    assert post(client(Stub(seconds=5), timeout_s=0.02)).status_code == 504
    broken = post(client(Stub(ArithmeticError("secret path"))), headers={"X-Request-Id": "abc"})
    assert broken.status_code == 500 and "secret" not in broken.text and "abc" in broken.text


def test_the_meter_counts_answers():
    stub = Stub()
    app = Application([stub], "")
    http = TestClient(app.asgi, base_url="http://localhost")
    for n in (1, 2, 10_000):
        post(http, n=n)
    http.get("/v1/models")
    assert {k: v for k, v in app.meter.requests.items() if v} == {200: 2, 400: 1} and app.meter.images == 3
    assert set(app.meter.quantiles()) == {0.5, 0.95, 0.99}
    assert [quantile([1.0, 2.0, 3.0, 4.0], q) for q in (0.25, 0.5, 0.51, 0.99, 1)] == [1, 2, 3, 4, 4]
    assert Meter().quantiles() == {}


# Whom it refuses


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.5:8000", "127.0.0.1.evil.example", "", "0.0.0.0"])
def test_without_a_token_only_this_machine_is_served(host):
    http = client()
    answer = post(http, headers={"Host": host})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "wrong_host"
    for name in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert post(http, headers={"Host": name}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8001"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_pages_of_other_sites_are_refused(headers, token):
    http, mine = client(token=token), {"Authorization": f"Bearer {TOKEN}"}
    answer = post(http, headers=headers | mine)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    own = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    assert post(http, headers=own | mine).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN.upper()}",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {hashlib.sha256(TOKEN.encode()).hexdigest()}",
        "Bearer \xff\xfe",
    ],
)
def test_a_forged_token_is_refused(given):
    stub = Stub()
    http = client(stub, token=TOKEN, host="images.example")
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    for answer in (post(http, headers=headers), http.get("/v1/models", headers=headers)):
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert stub.asked == []
    assert post(http, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert http.get("/").text == "<p>page</p>" and http.get("/healthz").status_code == 200  # which say nothing of it


def test_the_page_loads_nothing_and_no_frame_holds_it():
    answer = client().get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert "http" not in page().replace("http-equiv", "")
    evil = render(Path(__file__).parents[1] / "dashboards" / "serve.html", title="</title><script>x</script>")
    assert "<script>x" not in evil


# The settings


def test_a_server_that_others_reach_needs_a_token(monkeypatch):
    digest = hashlib.sha256(TOKEN.encode()).digest()
    monkeypatch.delenv("FEWSTEP_TOKEN", raising=False)
    assert token_digest() is None
    for host in ("0.0.0.0", "::", "192.168.1.5", "images.example"):
        with pytest.raises(ValueError, match="set a token in the environment variable FEWSTEP_TOKEN"):
            check(Settings(model="x", host=host), None)
        check(Settings(model="x", host=host), digest)
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        check(Settings(model="x", host=host), None)
    for short in ("", "short", "with a blank in the middle", "é" * 20):
        monkeypatch.setenv("FEWSTEP_TOKEN", short)
        with pytest.raises(ValueError, match="FEWSTEP_TOKEN: a token has 16 or more"):
            token_digest()
    monkeypatch.setenv("FEWSTEP_TOKEN", TOKEN)
    assert token_digest() == digest
    with pytest.raises(ValueError, match="queue: 8, but a request may ask for 16 images"):
        check(validate(Settings, {"model": "x", "queue": 8}), None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=nowhere"], "model: no folder"),
        (["model=models:/../../etc@newest"], "model: 'models:/../../etc@newest' is no registered model"),
        (["model=shipped:fashion_mnist/teacher", "host=0.0.0.0"], "host: '0.0.0.0' can be reached"),
        (["model=shipped:fashion_mnist/teacher", "name=../x"], "name: '../x' is no plain name"),
        (["model=shipped:fashion_mnist/teacher", "teacher=nowhere"], "teacher: no folder 'nowhere'"),
        (["model=shipped:fashion_mnist/teacher", "images=101"], "images: must be at most 100, got 101"),
    ],
)
def test_a_mistake_is_reported_before_ray_starts(arguments, says, monkeypatch, capsys):
    monkeypatch.delenv("FEWSTEP_TOKEN", raising=False)
    monkeypatch.setattr("fewstep.cluster.session.ray.init", lambda *args, **kwargs: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as stop:
        job("serve")(arguments)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_names_and_the_teacher_beside_a_student(export):
    assert name_of(str(export)) == "two" and name_of("models:/a b@newest") == "a b" and name_of("hub:me/net") == "net"
    generator = open_student(Settings(model=str(export)))
    assert (generator.about.role, generator.about.class_names, generator.about.calls) == ("student", NAMES, 2)
    assert open_beside(Settings(model=str(export)), generator.about) is None
    assert open_beside(Settings(model=str(export), teacher=False), generator.about) is None
    settings = Settings(model=str(export), teacher="shipped:fashion_mnist/teacher", steps=5)
    beside = open_beside(settings, generator.about)
    assert beside.about.to_dict() == {
        **{"name": "two-teacher", "role": "teacher", "takes": "class", "size": "28x28", "sampler": "heun-5"},
        **{"calls": 9, "classes": 10, "class_names": list(NAMES), "steps": 5},
    }
    json.dumps(beside.about.to_dict())
