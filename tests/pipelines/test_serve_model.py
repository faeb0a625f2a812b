"""What is said, and how soon, if a model can't be served as asked. What it does: tests/e2e/test_serve_model.py."""

import socket
from functools import partial

import pytest

from pipelines.serve_model import main
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.weights import save_model
from tests.support.process import free_ports


@pytest.fixture
def serve(run_main, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    return partial(run_main, main)


@pytest.fixture
def saved_model(tmp_path):
    config = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
    save_model(tmp_path / "saved", config, build_model(config, seed=0).state_dict())
    return tmp_path / "saved"


def test_a_port_that_is_taken_is_one_line(serve, saved_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = serve(saved_model, "--port", port)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: --host 127.0.0.1 --port {port}: can't be listened on (Address already in use)")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "MODEL is"]),
        (["bicubic"], ["'bicubic': is no network"]),
        (["models:/a/b/c"], ["models:/a/b/c", "models:/name@alias"]),
        (["{saved}", "--host", "203.0.113.7"], ["--host 203.0.113.7", "Cannot assign"]),
        (["{saved}", "--host", "no.such.host.invalid"], ["--host no.such.host.invalid"]),
        (["{saved}", "--port", "0"], ["--port 0: must be 1 to 65535"]),
        (["{saved}", "--max-mb", "0"], ["--max-mb 0.0: must be more than 0"]),
        (["{saved}", "--num-replicas", "0"], ["--num-replicas 0: must be at least 1"]),
        (["{saved}", "--gpus-per-replica", "1.5"], ["--gpus-per-replica 1.5", "whole number"]),
        (["{saved}", "--tile-px-lr", "4096"], ["--tile-px-lr 4096: must be 16 to 512"]),
        (["{saved}", "--route-prefix", "sr/"], ["--route-prefix 'sr/'"]),
        (["{saved}", "--precision", "float8"], ["--precision", "bfloat16"]),
    ],
)
def test_mistakes_are_named_before_anything_is_started(serve, saved_model, arguments, words):
    (port,) = free_ports(1)
    status, out, err = serve("--port", port, *(argument.format(saved=saved_model) for argument in arguments))
    said = " ".join(err.replace("│", " ").split())
    assert (status, out) == (2, "") and all(word in said for word in words), err
