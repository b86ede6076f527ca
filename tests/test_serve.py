"""The server on Ray Serve: a real job on a private cluster, one for all of these tests. The last one stops it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import importlib.util
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from demo import ROOT, listening
from job import job
from served import Running, exported, running
from test_grafana import Samples, scrape, selectors

from fewstep.cluster.gauges import SERVING

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(export, tmp_path_factory) -> Iterator[Running]:
    arguments = [f"model={export}", "teacher=shipped:fashion_mnist/teacher", "steps=3", "queue=200", "batch=1"]
    with running(tmp_path_factory.mktemp("server"), *arguments) as result:
        yield result


def ask(server: Running, **body: Any) -> dict[str, Any]:
    """The answer to a request for images; HTTPError otherwise."""
    data = json.dumps({"prompt": "3", "seed": 7} | body).encode()
    request = urllib.request.Request(f"{server.url}/v1/images/generations", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def files(answer: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(image["b64_json"]) for image in answer["data"]]


def replicas(server: Running, name: str = "Student") -> list[psutil.Process]:
    """The processes of a deployment."""
    result = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            result += [process] if f"ServeReplica:two:{name}" in process.name() else []
    return result


def test_its_images_are_those_of_the_sample_job(server, export, tmp_path):
    arguments = [f"model={export}", "images=4", "labels=3", "seed=7", f"out={tmp_path / 'grid.png'}"]
    job("sample")([*arguments, f"each={tmp_path / 'each'}"])
    wanted = [path.read_bytes() for path in sorted((tmp_path / "each").iterdir())]
    assert files(ask(server, prompt="Dress", n=4)) == wanted
    assert len(files(ask(server, model="two-teacher", n=2))) == 2


def test_every_answer_has_one_request_id_and_the_callers_own_is_kept(server):
    for given in (None, "mine-7"):
        headers = {} if given is None else {"X-Request-Id": given}
        with urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/models", headers=headers)) as answer:
            [result] = answer.headers.get_all("X-Request-Id")
        assert result == given or (given is None and len(result) == 36)


def test_nothing_of_it_listens_for_other_machines(server):
    result = listening(psutil.Process(server.process.pid))
    assert len(replicas(server)) == 2 and len(replicas(server, "Teacher")) == 1
    assert {address for _, address, _ in result} == {"127.0.0.1"}
    assert len([port for _, _, port in result if server.url.endswith(f":{port}")]) == 1


def test_a_long_body_is_refused_through_ray_serves_proxy(server):
    def chunks() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 4096

    request = urllib.request.Request(f"{server.url}/v1/images/generations", chunks(), method="POST")
    request.add_header("Content-Type", "application/json")
    with pytest.raises((urllib.error.HTTPError, OSError)) as refused:  # the connection may close while more is sent
        urllib.request.urlopen(request, timeout=60)
    assert getattr(refused.value, "code", 413) == 413
    assert files(ask(server))


def test_the_official_client_works_unchanged(server):
    if importlib.util.find_spec("openai") is None:
        pytest.skip("openai, the official client, is not installed: pip install openai")
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["two", "two-teacher"]
    asked = {"model": "two", "prompt": "Dress", "n": 2, "size": "16x16", "response_format": "b64_json"}
    answer = client.images.generate(**asked, extra_body={"seed": 7})
    assert [base64.b64decode(image.b64_json) for image in answer.data] == files(ask(server, n=2))
    with pytest.raises(openai.BadRequestError, match="n: 10000 images") as wrong:
        client.images.generate(prompt="3", n=10_000)
    assert wrong.value.param == "n"
    with pytest.raises(openai.NotFoundError, match="model: no 'dall-e-3' here"):
        client.images.generate(prompt="3", model="dall-e-3")


def exports(server: Running) -> Samples:
    """The text of the node's metrics endpoint; its port is one of the agent's, and others there speak no HTTP."""
    for name, _, port in listening(psutil.Process(server.process.pid)):
        if "Agent" in name:
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                result = scrape(port)
                if any(key.startswith("ray_fewstep_serve") for key in result):
                    return result
    return {}


def test_every_query_of_the_board_asks_for_what_a_server_exports(server):
    ask(server, n=3)
    with contextlib.suppress(urllib.error.HTTPError):
        ask(server, n=10_000)
    deadline, wanted = time.monotonic() + 60, {f"ray_fewstep_{name}" for name in SERVING}
    while not wanted <= (samples := exports(server)).keys() and time.monotonic() < deadline:
        time.sleep(1)
    board = json.loads((ROOT / "dashboards" / "grafana" / "serving.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"]["query"] for variable in board["templating"]["list"]]
    asked = [result for query in queries for result in selectors(query)]
    assert {name for name, _ in asked} == wanted <= samples.keys()
    for name, labels in asked:
        for label, values in labels.items():
            assert values <= {result[label] for result, _ in samples[name]}, (name, label)


def drawing(server: Running) -> set[str]:
    """The replicas that have sent images, as their metrics say some seconds later."""
    return {labels["replica"] for labels, images in exports(server).get("ray_fewstep_serve_images", []) if images}


@pytest.mark.fault
def test_a_replica_killed_under_load_loses_its_own_answers_at_most(server, record_property):
    wanted, victim = files(ask(server)), replicas(server)[0].pid
    done, failed, ended = [], [], threading.Event()

    def keep_asking() -> None:
        while not ended.is_set():
            start = time.monotonic()
            try:
                right = files(ask(server)) == wanted
                done.append((start, time.monotonic(), right))
            except OSError:  # HTTPError is one
                failed.append(start)

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        while len(done) < 20 or len(drawing(server)) < 2:
            time.sleep(0.1)
        before, killed = drawing(server), time.monotonic()
        os.kill(victim, signal.SIGKILL)
        while not drawing(server) - before:
            assert time.monotonic() - killed < 240
            time.sleep(0.5)
        back = time.monotonic()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    record_property("lost", len(failed))
    record_property("answered meanwhile", sum(killed < end < back for _, end, _ in done))
    record_property("longest wait", f"{max(end - start for start, end, _ in done):.1f} s")
    record_property("a new replica's images were seen after", f"{back - killed:.1f} s")
    assert len(failed) <= 4 and all(start <= killed for start in failed)  # those in flight
    assert all(right for *_, right in done) and sum(killed < end < back for _, end, _ in done) > 10


def test_a_stopped_server_answers_what_is_in_work_and_ends(server):
    with ThreadPoolExecutor(9) as pool:
        slow = pool.submit(ask, server, model="two-teacher", steps=100)
        asked = [pool.submit(ask, server, n=8) for _ in range(8)]
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        refused = None
        while refused is None and not slow.done():
            try:
                ask(server)
            except urllib.error.HTTPError as error:
                refused = error
        assert (refused.code, refused.headers["Retry-After"]) == (503, "10")
        assert len(slow.result()["data"]) == 1
        assert [len(future.result()["data"]) for future in asked] == [8] * 8
    assert server.process.wait(60) == 0
    assert json.loads(server.log.read_text().strip().splitlines()[-1]) == {"drained": True}
    with pytest.raises(OSError):
        ask(server)


def test_a_token_is_asked_for_on_every_address(export, tmp_path):
    token = hashlib.sha256(os.urandom(8)).hexdigest()
    with running(tmp_path, f"model={export}", "replicas=1", "host=0.0.0.0", env={"FEWSTEP_TOKEN": token}) as server:
        for given, status in ((None, 401), ("wrong", 401), (token, 200)):
            headers = {} if given is None else {"Authorization": f"Bearer {given}"}
            try:
                answer = urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/models", headers=headers))
            except urllib.error.HTTPError as error:
                answer = error
            assert answer.status == status
        assert token not in server.log.read_text()
