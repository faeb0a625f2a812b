"""A model that follows an alias of a real registry: what it changes over to, and what it does not."""

import socket
import socketserver
import threading
from contextlib import suppress
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import torch
from mlflow import MlflowClient

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.weights import save_model
from sr_serve import live_model
from sr_serve.live_model import LiveModel
from sr_train.model_registry import pack_model
from sr_train.tracking import start_run
from sr_train.upscaler import UpscalerError

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
CPU = torch.device("cpu")


class Registry:
    """A registered model of the test's own, and what to do with it."""

    def __init__(self, uri, name, folder):
        self.name, self.folder, self.num_versions = name, folder, 0
        self.run = start_run(tracking_uri=uri, experiment="live", run_name="r", params={}, tags={}, texts={})
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self.client.create_registered_model(name)
        self.model = f"models:/{name}@champion"

    def add(self, config=CONFIG, *, spoil=lambda state: None):
        """A new version, which becomes champion."""
        version = self.new()
        self.fill_last(config, spoil=spoil)
        self.promote(version)

    def add_empty(self):
        """A champion whose files are not there."""
        self.promote(self.new())

    def new(self):
        self.num_versions += 1
        source = f"{self.client.get_run(self.run.run_id).info.artifact_uri}/{self.num_versions}"
        self.client.create_model_version(self.name, source, self.run.run_id, await_creation_for=0)
        return str(self.num_versions)

    def fill_last(self, config=CONFIG, *, spoil=lambda state: None):
        state = build_model(config, seed=0).state_dict()
        spoil(state)
        place = self.folder / str(self.num_versions)
        save_model(place / "saved", config, state)
        pack_model(place / "saved", place / "packed")
        self.client.log_artifacts(self.run.run_id, str(place / "packed"), place.name)

    def promote(self, version):
        self.client.set_registered_model_alias(self.name, "champion", version)


@pytest.fixture
def registry(mlflow_server, tmp_path, request):
    (tmp_path / "versions").mkdir()
    name = request.node.name.replace("[", "-").replace("]", "")
    return Registry(mlflow_server.uri, name, tmp_path / "versions")


@pytest.fixture
def live(registry, mlflow_server):
    """Version 1 answers, and what it says is in `said`."""
    registry.add()
    said = []
    model = LiveModel(registry.model, tracking_uri=mlflow_server.uri, device=CPU, say=said.append)
    model.said = said
    assert model.current.facts.version == "1"
    return model


def spoil_with_nan(state):
    next(iter(state.values())).fill_(torch.nan)


def test_a_new_champion_answers_and_who_holds_the_old_one_finishes_with_it(live, registry):
    assert not live.refresh() and live.said == []
    held = live.current
    registry.add(replace(CONFIG, scale=3))
    assert live.refresh()
    facts = live.current.facts
    assert (facts.name, facts.version, facts.scale) == (registry.name, "2", 3)
    lr_NCHW = torch.zeros(1, 3, 4, 5)
    assert live.current.network(lr_NCHW).shape == (1, 3, 12, 15)
    assert held.network(lr_NCHW).shape == (1, 3, 8, 10) and held.facts.version == "1"
    assert len(live.said) == 1 and "version 2 answers now" in live.said[0] and "x3 instead of x2" in live.said[0]
    registry.promote("1")  # a rollback is a new champion too
    assert live.refresh() and live.current.facts == held.facts


@pytest.mark.parametrize("fault", ["gives no numbers", "is not there"])
def test_a_version_that_does_not_work_is_said_once_and_changes_nothing(live, registry, fault):
    if fault == "is not there":
        registry.add_empty()
    else:
        registry.add(spoil=spoil_with_nan)
    before = live.current
    assert [live.refresh() for _ in range(3)] == [False] * 3
    assert live.current is before
    assert len(live.said) == 1 and f"{registry.name}/2 can't be used" in live.said[0], live.said
    assert "version 1 goes on" in live.said[0]
    registry.add()
    assert live.refresh() and live.current.facts.version == "3"


def test_a_version_that_failed_is_tried_again_ever_more_rarely(live, registry):
    registry.add_empty()
    assert not any(live.refresh(poll_s=1.0) for _ in range(4))  # the first, second and fourth try it
    registry.fill_last()
    assert [live.refresh(poll_s=1.0) for _ in range(4)] == [False, False, False, True]
    assert live.current.facts.version == "2"


def test_an_alias_that_is_gone_changes_nothing(live, registry):
    registry.client.delete_registered_model_alias(registry.name, "champion")
    assert not live.refresh() and not live.refresh()
    assert live.current.facts.version == "1"
    assert len(live.said) == 1 and "no version of it has this alias" in live.said[0]


def test_a_registry_that_is_away_is_said_once_and_asked_again(registry, mlflow_server):
    registry.add()
    gate = Gate(urlsplit(mlflow_server.uri).port)
    said = []
    live = LiveModel(registry.model, tracking_uri=gate.open(), device=CPU, say=said.append)
    gate.close()
    registry.add()
    assert not live.refresh() and not live.refresh()
    assert live.current.facts.version == "1"
    assert len(said) == 1 and "can't be reached" in said[0]
    gate.open()
    assert live.refresh() and live.current.facts.version == "2"
    gate.close()


def test_the_alias_is_watched_in_the_background(registry, mlflow_server):
    registry.add()
    changed = threading.Event()
    live = LiveModel(registry.model, tracking_uri=mlflow_server.uri, device=CPU, say=lambda _: changed.set())
    live.watch(0.05)
    registry.add()
    assert changed.wait(30) and live.current.facts.version == "2"
    live.stop()


def test_nothing_that_is_raised_ends_the_watch(live, registry, monkeypatch):
    """Of a kind that nobody foresaw: a damaged MLmodel, an object store's client."""
    said, right = threading.Event(), live_model.pinned
    monkeypatch.setattr(live, "_say", lambda message: (live.said.append(message), said.set()))

    def wrong(*_, **__):
        raise KeyError("artifact_path")

    monkeypatch.setattr(live_model, "pinned", wrong)
    live.watch(0.02)
    assert said.wait(60)
    registry.add()
    assert len(live.said) == 1 and "KeyError: 'artifact_path'" in live.said[0]
    assert "version 1 goes on answering" in live.said[0]
    said.clear()
    monkeypatch.setattr(live_model, "pinned", right)
    assert said.wait(60) and live.current.facts.version == "2"
    live.stop()


def test_a_version_whose_loading_raises_something_unforeseen_changes_nothing(live, registry, monkeypatch):
    registry.add()
    with monkeypatch.context() as patch:
        patch.setattr(live_model, "open_network", lambda *_, **__: {}["flavors"])
        assert not live.refresh() and not live.refresh()
    assert len(live.said) == 1 and "(KeyError: 'flavors')" in live.said[0]
    assert live.refresh() and live.current.facts.version == "2"


def test_a_version_given_by_number_is_not_left(registry, mlflow_server):
    registry.add()
    uri = f"models:/{registry.name}/1"
    live = LiveModel(uri, tracking_uri=mlflow_server.uri, device=CPU, say=pytest.fail)
    registry.add()
    assert not live.refresh() and live.current.facts.version == "1"


def test_a_folder_is_served_too(tmp_path):
    save_model(tmp_path / "mine", CONFIG, build_model(CONFIG, seed=0).state_dict())
    live = LiveModel(f"{tmp_path}/mine/", tracking_uri=None, device=CPU, say=pytest.fail)
    facts = live.current.facts
    assert (facts.name, facts.version, facts.scale, facts.architecture) == ("mine", None, 2, "edsr")
    assert not live.refresh()


def test_the_first_model_must_work(registry, mlflow_server):
    with pytest.raises(UpscalerError, match="no version of it has this alias"):
        LiveModel(registry.model, tracking_uri=mlflow_server.uri, device=CPU, say=pytest.fail)
    registry.add(spoil=spoil_with_nan)
    with pytest.raises(ModelError, match="not all of them finite"):
        LiveModel(registry.model, tracking_uri=mlflow_server.uri, device=CPU, say=pytest.fail)


class Gate:
    """A way to the server that can be closed: connections are refused then, and those that are open end."""

    def __init__(self, port):
        self.to, self.port, self.server, self.sockets = port, 0, None, []

    def open(self):
        gate = self

        class Forward(socketserver.BaseRequestHandler):
            def handle(self):
                there = socket.create_connection(("127.0.0.1", gate.to))
                gate.sockets += [self.request, there]
                back = threading.Thread(target=pump, args=(there, self.request), daemon=True)
                back.start()
                pump(self.request, there)
                back.join()

        socketserver.ThreadingTCPServer.allow_reuse_address = True
        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", self.port), Forward)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{self.port}"

    def close(self):
        self.server.shutdown()
        for open_socket in self.sockets:
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
        self.sockets.clear()
        self.server.server_close()


def pump(source, target):
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
