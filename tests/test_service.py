"""The service: what it answers, alone and under load, and how it starts and stops."""

import asyncio
import json
import shutil
import socket
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from serving import PATIENCE, Server, running, start, until
from typer.testing import CliRunner

import mcdrop
from mcdrop.artifact import load
from mcdrop.cli import app as cli
from mcdrop.errors import ArtifactError, InputError
from mcdrop.intervals import INTERVALS
from mcdrop.predict import predict
from service import Settings, create_app
from service.registry import Registry
from service.schemas import PredictRequest, PredictResponse
from service.settings import read_settings

ROWS = [[-0.5], [0.0], [3.0]]
LINE = {"model": "line", "inputs": ROWS, "passes": 50}
LONG = {"model": "line", "version": "1", "inputs": [[x / 1000] for x in range(1000)], "passes": 1500}
CLASSES = {"model": "classes", "inputs": np.eye(4).tolist(), "passes": 50}


@pytest.fixture(scope="module")
def app(store: Path) -> FastAPI:
    made = create_app(Settings(store=store))
    made.state.registry.load()
    return made


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(once())


def post(app: FastAPI, **body: Any) -> dict[str, Any]:
    response = ask(app, "POST", "/predict", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["line", "classes"])
def test_the_answer_is_what_the_library_gives(app: FastAPI, store: Path, name: str) -> None:
    body = {"line": LINE, "classes": CLASSES}[name] | {"level": 0.8, "interval": "quantile", "seed": 3, "samples": True}
    model = load(store / name)
    expected = predict(model, body["inputs"], passes=50, level=0.8, interval="quantile", seed=3, keep_samples=True)
    answer = post(app, **body)
    assert list(answer) == list(PredictResponse.model_fields)
    head = {"model": name, "version": model.version, "task": model.task, "passes": 50}
    assert {key: answer.pop(key) for key in head} == head
    for key, value in answer.items():
        wanted = getattr(expected, key)
        assert value == (wanted.tolist() if isinstance(wanted, np.ndarray) else wanted), key


def test_a_fitted_screen_flags_and_without_one_the_answer_says_why(app: FastAPI) -> None:
    flagged = post(app, **LINE)
    assert flagged["is_anomaly"] == [False, False, True]
    assert flagged["fpr"] == 0.05
    assert flagged["screen_note"] is None
    bare = post(app, **LINE, version="1")
    assert bare["is_anomaly"] is bare["score"] is bare["p_value"] is None
    assert "no screen is fitted" in bare["screen_note"]


def test_left_out_options_are_the_defaults_of_the_model(app: FastAPI) -> None:
    short = post(app, model="line", inputs=ROWS)
    assert short == post(app, model="line", version="2", inputs=ROWS, passes=100, level=0.95, seed=0, samples=False)
    assert (short["interval"], short["interval_kind"]) == ("student_t", "credible")


def test_inputs_may_be_named(app: FastAPI) -> None:
    assert post(app, **LINE) == post(app, **{**LINE, "inputs": {"input": ROWS}})


@pytest.mark.parametrize("interval", sorted(name for name, one in INTERVALS.items() if one.kind != "prediction"))
def test_every_interval_can_be_asked_for(app: FastAPI, interval: str) -> None:
    response = ask(app, "POST", "/predict", json={**LINE, "interval": interval})
    answer = response.json()
    if response.status_code == 422:  # it rests on what this model does not have
        assert f"interval '{interval}' needs" in answer["error"]
        return
    assert answer["interval"] == interval
    assert np.all(np.array(answer["lower"]) < np.array(answer["upper"]))


def test_a_row_is_answered_alone_as_among_others(app: FastAPI) -> None:
    whole = np.array(post(app, **LINE)["mean"])
    alone = [post(app, **{**LINE, "inputs": [row]})["mean"][0] for row in ROWS]
    np.testing.assert_allclose(whole, alone, rtol=1e-5)


def test_any_content_type_and_a_byte_order_mark_are_taken(app: FastAPI) -> None:
    body = json.dumps(LINE).encode()
    for headers in ({}, {"content-type": "application/octet-stream"}, {"content-type": "text/plain; charset=latin-1"}):
        assert ask(app, "POST", "/predict", content=body, headers=headers).status_code == 200
    assert ask(app, "POST", "/predict", content=b"\xef\xbb\xbf" + body).status_code == 200


def test_the_only_model_and_the_default_model_need_no_name(app: FastAPI, store: Path, tmp_path: Path) -> None:
    (tmp_path / "line").symlink_to(store / "line")
    for settings in (Settings(store=tmp_path), Settings(store=store, default_model="line")):
        made = create_app(settings)
        made.state.registry.load()
        assert post(made, inputs=ROWS, passes=50) == post(app, **LINE)


# -- models and documentation ------------------------------------------------------------------------------------------


def test_models_are_listed(app: FastAPI) -> None:
    models = ask(app, "GET", "/models").json()["models"]
    assert [(m["name"], m["version"], m["task"]) for m in models] == [
        ("classes", "1", "classification"),
        ("line", "1", "regression"),
        ("line", "2", "regression"),
    ]
    newest = models[-1]
    assert newest["inputs"] == [{"name": "input", "dtype": "float32", "shape": [-1, 1]}]
    assert (newest["features"], newest["passes"], newest["sites"], newest["screen"]) == (["x"], 100, 2, True)


def test_a_model_shows_its_manifest_and_audit(app: FastAPI, store: Path) -> None:
    newest = ask(app, "GET", "/models/line").json()
    assert (newest["version"], newest["manifest"]["description"]) == ("2", "a line")
    expected = json.loads(json.dumps(load(store / "line").audit.to_dict()))
    assert newest["audit"].pop("prepare_seconds") > 0  # differs from load to load
    assert newest["audit"] == {name: value for name, value in expected.items() if name != "prepare_seconds"}
    assert ask(app, "GET", "/models/line", params={"version": "1"}).json()["version"] == "1"


def test_a_manifest_may_hold_whatever_toml_holds(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store / "line", tmp_path / "line")
    for manifest in tmp_path.glob("line/*/model.toml"):
        more = "created = 2026-01-01\nat = 2026-01-01T07:32:00Z\ndaily = 07:32:00\nloss = nan\n"
        manifest.write_text(more + manifest.read_text())
    app = create_app(Settings(store=tmp_path))
    app.state.registry.load()
    response = ask(app, "GET", "/models/line")
    assert response.status_code == 200
    told = response.json()["manifest"]
    assert [told[name] for name in ("created", "at", "daily", "loss")] == [
        "2026-01-01", "2026-01-01T07:32:00Z", "07:32:00", None,
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_the_documented_answer_holds_for_outputs_of_any_shape(task: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)  # five rows of two steps
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
    mcdrop.save(mcdrop.wrap(network, example=rows, task=task, tuning={}), tmp_path / "steps" / "1")
    app = create_app(Settings(store=tmp_path))
    app.state.registry.load()
    answer = post(app, inputs=rows.tolist(), passes=20, samples=True)
    assert np.shape(answer["mean"]) == (5, 2, 2)
    assert PredictResponse.model_validate(answer).model_dump() == answer
    numbers = ask(app, "GET", "/openapi.json").json()["components"]["schemas"]["Numbers"]
    assert numbers["type"] == "array"
    assert {"$ref": "#/components/schemas/Numbers"} in numbers["items"]["anyOf"]


def test_the_documentation_describes_the_body(app: FastAPI) -> None:
    assert ask(app, "GET", "/docs").status_code == 200
    api = ask(app, "GET", "/openapi.json").json()
    operation = api["paths"]["/predict"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(PredictRequest.model_fields)
    assert set(INTERVALS) < set(schema["properties"]["interval"]["enum"])
    for example in schema["examples"]:
        PredictRequest.model_validate(example)
    assert {"200", "400", "413", "422", "429", "503"} <= set(operation["responses"])
    assert api["info"]["version"] == mcdrop.__version__


# -- under load --------------------------------------------------------------------------------------------------------


def test_twenty_requests_at_once_get_what_each_gets_alone(server: Server) -> None:
    bodies = [{**(CLASSES if i % 3 else LINE), "seed": i, "level": 0.5 + i / 50} for i in range(20)]
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        alone = [client.post("/predict", json=body).json() for body in bodies]
        with ThreadPoolExecutor(20) as pool:
            together = list(pool.map(lambda body: client.post("/predict", json=body).json(), bodies))
    assert together == alone
    assert len({json.dumps(answer["mean"]) for answer in alone}) == 20


def test_health_answers_while_a_long_request_is_computed(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client, ThreadPoolExecutor(1) as pool:
        long = pool.submit(client.post, "/predict", json=LONG)
        during = []
        while not long.done():
            assert client.get("/health/live").json() == {"live": True}
            during.append(not long.done())
        assert long.result().status_code == 200
    assert sum(during) > 3


# -- start and stop ----------------------------------------------------------------------------------------------------


def test_live_at_once_and_ready_when_the_models_are_loaded(store: Path) -> None:
    async def watch() -> None:
        app = create_app(Settings(store=store))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            gate = threading.Event()
            load_now = app.state.registry.load
            app.state.registry.load = lambda: gate.wait() and load_now()
            async with app.router.lifespan_context(app):
                assert (await client.get("/health/live")).json() == {"live": True}
                for method, path in (("GET", "/health/ready"), ("GET", "/models"), ("POST", "/predict")):
                    response = await client.request(method, path)
                    assert response.status_code == 503
                    assert "still being loaded" in response.json()["error"]
                assert (await client.get("/health/ready")).json()["ready"] is False
                gate.set()
                while (await client.get("/health/ready")).status_code == 503:
                    await asyncio.sleep(0.01)
                assert (await client.get("/health/ready")).json() == {"ready": True}

    asyncio.run(watch())


def test_settings_can_make_the_start_wait_for_the_models(store: Path) -> None:
    async def watch() -> int:
        app = create_app(Settings(store=store, wait_for_models=True))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            return (await client.get("/health/ready")).status_code

    assert asyncio.run(watch()) == 200


def test_nothing_is_read_from_the_environment_before_the_app_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCDROP_MAX_ROWS", "7")
    assert create_app().state.settings.max_rows == 7
    assert create_app(Settings(max_rows=8)).state.settings.max_rows == 8


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    """So a container's own default model can be taken back."""
    for name in ("DEFAULT_MODEL", "STORE", "PORT", "DEVICES"):
        monkeypatch.setenv(f"MCDROP_{name}", "")
    found = Settings()
    assert (found.default_model, found.store, found.port, found.devices) == (None, Path("models/store"), 8000, ())
    assert Registry(store, found.default_model).entries()
    with pytest.raises(ArtifactError, match=r"'' is not in .*; it holds: classes, line; set MCDROP_DEFAULT_MODEL to"):
        Registry(store, "").entries()


def test_an_empty_address_is_not_that_of_every_network(tmp_path: Path) -> None:
    """A socket that is bound to "" listens on all of them; on the command line an empty option says nothing."""
    with pytest.raises(InputError, match="MCDROP_HOST: String should have at least 1 character, got ''"):
        read_settings(host="")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(cli, ["serve", str(tmp_path), "--host", "", "--port", port])
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def test_a_second_interrupt_ends_the_app_without_a_failure(tmp_path: Path) -> None:
    """Uvicorn then leaves its lifespan to be cancelled; what failed in one is logged with a traceback."""
    told: list[str] = []

    async def interrupted() -> None:
        async def tell(message: Any) -> None:
            told.append(message["type"])

        async def hear() -> Any:
            return await asyncio.Event().wait() if told else {"type": "lifespan.startup"}

        running = asyncio.create_task(create_app(Settings(store=tmp_path))({"type": "lifespan"}, hear, tell))
        await until(lambda: bool(told))
        running.cancel()
        await running

    asyncio.run(interrupted())
    assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_stopping_finishes_the_running_request(store: Path, tmp_path: Path) -> None:
    with running(store, tmp_path / "log.txt") as own, httpx.Client(base_url=own.url, timeout=PATIENCE) as client:
        assert client.get("/health/live").status_code == 200
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(client.post, "/predict", json=LONG)
            time.sleep(0.3)  # so that the request is there before the signal
            assert not long.done()
            own.stop()
            assert long.result().status_code == 200
        with pytest.raises(httpx.ConnectError):
            client.get("/health/live")
    assert "Traceback" not in own.log.read_text()


def test_what_is_not_done_when_the_time_to_stop_is_over_is_told_so(store: Path, tmp_path: Path) -> None:
    """One request is computed and two wait, when the server is stopped without any time for them."""
    settings = {"threads": 1, "max_waiting": 2, "drain_seconds": 0}
    with running(store, tmp_path / "log.txt", **settings) as own, ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(httpx.post, f"{own.url}/predict", json=LONG, timeout=PATIENCE) for _ in range(4)]
        refused, others = wait(sent, return_when=FIRST_COMPLETED)
        assert [one.result().status_code for one in refused] == [429]  # so the others are there
        own.stop()
        answers = [one.result() for one in others]
    assert [answer.status_code for answer in answers] == [503] * 3
    for answer in answers:
        assert int(answer.headers["retry-after"]) >= 1
        assert "the service is stopping" in answer.json()["error"]
    assert "Traceback" not in own.log.read_text()


def failed(store: Path, log: Path, *, port: int = 0) -> str:
    """The last line of a server that cannot start."""
    assert start(store, log, port=port).wait(PATIENCE) == 1
    text = log.read_text()
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_broken_model_folder_is_named_at_start(store: Path, tmp_path: Path) -> None:
    broken = tmp_path / "store" / "line" / "1"
    broken.mkdir(parents=True)
    for path in (store / "line" / "1").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert f"the model in {broken} cannot be served" in failed(tmp_path / "store", tmp_path / "log.txt")


def test_a_store_without_models_is_named_at_start(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no model" in failed(tmp_path, tmp_path / "log.txt")
    (tmp_path / "line" / "1").mkdir(parents=True)
    assert f"the model in {tmp_path}/line/1 cannot be served: it has no model.toml" in failed(
        tmp_path, tmp_path / "log"
    )


def test_a_model_in_place_of_a_store_gets_the_folder_to_give(store: Path) -> None:
    with pytest.raises(ArtifactError, match=f"holds no model as NAME/VERSION; .* give the folder above: {store}$"):
        Registry(store / "line").entries()
    with pytest.raises(ArtifactError, match="is a model, not a store; give the folder above its name"):
        Registry(store / "line" / "1").entries()


def test_a_busy_port_is_one_line(store: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = failed(store, tmp_path / "log.txt", port=port)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said
