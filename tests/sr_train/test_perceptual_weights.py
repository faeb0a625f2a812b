"""VGG19's weights: from which files they are taken, and what is refused before anything is trained."""

import hashlib
import io
import os
import pickle
import random
import re
import runpy
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import VGG19_Weights, alexnet, vgg16, vgg19

from sr_data.storage import open_store
from sr_train.options import ConfigError
from sr_train.perceptual_weights import (
    VGG19_LAYERS,
    PerceptualConfig,
    PerceptualWeightsError,
    load_alexnet_weights,
    load_vgg19_weights,
)
from tests.support.s3 import S3Server

EARLY = "conv1_2"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """VGG19's features with random weights that half precision holds exactly."""
    torch.manual_seed(0)
    features = vgg19(weights=None).features.half().state_dict()
    return {f"features.{key}": tensor for key, tensor in features.items()}


@pytest.fixture(scope="module")
def vgg19_file(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> Path:
    """`state` as torch saves it, 40 MB."""
    path = tmp_path_factory.mktemp("weights") / "vgg19.pth"
    torch.save(state, path)
    return path


def from_file(path: Path | str, *, layer: str = "conv5_4", sha256: str | None = None) -> PerceptualConfig:
    return PerceptualConfig(weights=str(path), weights_sha256=sha256, layer=layer)


def assert_same(loaded: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    assert loaded.keys() == state.keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[key].float()), key


def save_as(content: object, path: Path, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- layers and options


def test_layer_names_count_torchvisions_convolutions_block_by_block() -> None:
    with torch.device("meta"):
        modules = list(vgg19(weights=None).features)
    expected, block, conv = {}, 1, 0
    for index, module in enumerate(modules):
        if isinstance(module, nn.MaxPool2d):
            block, conv = block + 1, 0
        elif isinstance(module, nn.Conv2d):
            conv += 1
            expected[f"conv{block}_{conv}"] = index
    assert expected == VGG19_LAYERS
    assert list(VGG19_LAYERS)[-1] == "conv5_4"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layer": "conv5_5"}, ["--perceptual.layer='conv5_5'", "conv1_1", "conv3_4", "conv5_4"]),
        ({"feature_scale": 0.0}, ["--perceptual.feature-scale=0.0", "greater than 0"]),
        ({"feature_scale": float("nan")}, ["--perceptual.feature-scale=nan"]),
        ({"weights_sha256": "dcbb9e9"}, ["--perceptual.weights-sha256='dcbb9e9'", "8 to 64 hex digits"]),
        ({"weights": "random", "weights_sha256": "dcbb9e9d"}, ["--perceptual.weights-sha256", "random"]),
        ({"weights": ""}, ["--perceptual.weights", "imagenet"]),
        ({"lpips_weights": "random"}, ["--perceptual.lpips-weights=random", "none"]),
    ],
)
def test_an_option_that_can_not_be_is_refused_with_its_flag(options: dict[str, object], named: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        PerceptualConfig(**options)
    assert all(text in str(refused.value) for text in named)


# --- files that are taken


def test_torchs_file_gives_float32_features_and_says_which_file_it_was(
    vgg19_file: Path, state: dict[str, Tensor]
) -> None:
    loaded = load_vgg19_weights(from_file(vgg19_file))
    assert_same(loaded.state, state)
    assert loaded.sha256 == sha256_of(vgg19_file)
    assert loaded.description == f"file vgg19.pth (sha256 {loaded.sha256[:8]}…, compared with nothing)"
    assert not loaded.is_random
    assert not loaded.is_official


def test_whole_networks_old_torch_files_and_safetensors_give_the_same(tmp_path: Path, state: dict[str, Tensor]) -> None:
    whole = {**state, "classifier.0.weight": torch.zeros(4), "classifier.0.bias": torch.zeros(4)}
    bare = {key.removeprefix("features."): tensor for key, tensor in state.items()}
    files = [
        save_as(whole, tmp_path / "whole.pth"),
        save_as(bare, tmp_path / "features.pth"),
        save_as(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False),
        tmp_path / "vgg19.safetensors",
    ]
    safetensors.torch.save_file(state, files[-1])
    for path in files:
        assert_same(load_vgg19_weights(from_file(path)).state, state)


def test_only_the_layers_up_to_the_chosen_one_are_kept(vgg19_file: Path) -> None:
    loaded = load_vgg19_weights(from_file(vgg19_file, layer="conv2_1"))
    assert list(loaded.state) == [f"features.{index}.{kind}" for index in (0, 2, 5) for kind in ("weight", "bias")]


def test_from_s3(any_s3: S3Server, vgg19_file: Path, state: dict[str, Tensor]) -> None:
    bucket = any_s3.new_bucket()
    sha256 = sha256_of(vgg19_file)
    open_store(bucket).write(f"nets/vgg19-{sha256[:8]}.pth", vgg19_file.read_bytes())
    loaded = load_vgg19_weights(from_file(f"{bucket}/nets/vgg19-{sha256[:8]}.pth"))
    assert_same(loaded.state, state)
    assert loaded.description == f"file vgg19-{sha256[:8]}.pth (sha256 {sha256[:8]}…)"
    with pytest.raises(PerceptualWeightsError, match=f"{bucket}/nets/other.pth"):
        load_vgg19_weights(from_file(f"{bucket}/nets/other.pth"))


def test_imagenet_is_torchvisions_download_and_needs_it_once(
    vgg19_file: Path,
    state: dict[str, Tensor],
    tmp_path: Path,
    offline: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchvision's URL is moved to a server on loopback, which the missing proxy does not stand before."""
    name = f"vgg19-{sha256_of(vgg19_file)[:8]}.pth"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / name).symlink_to(vgg19_file)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """The probe closes its connection before the file is through."""

    server = Server(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "site"))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    published = VGG19_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(published, "url", f"http://127.0.0.1:{server.server_port}/{name}")
    try:
        first = load_vgg19_weights(PerceptualConfig())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    second = load_vgg19_weights(PerceptualConfig())
    assert [path.name for path in offline.iterdir()] == [name]
    for loaded in (first, second):
        assert_same(loaded.state, state)
        assert loaded.is_official
        assert loaded.description == f"imagenet (sha256 {sha256_of(vgg19_file)[:8]}…)"
    # The same content under any name is still the published one.
    assert load_vgg19_weights(from_file(vgg19_file)).is_official


# --- files that are refused


def test_without_internet_the_error_says_what_was_tried_and_how_to_get_the_file(offline: Path) -> None:
    with pytest.raises(PerceptualWeightsError) as failed:
        load_vgg19_weights(PerceptualConfig())
    message = str(failed.value)
    assert message.startswith("--perceptual.weights imagenet: ")
    assert message.count(VGG19_Weights.IMAGENET1K_V1.url) == 2  # what was asked, and what to fetch elsewhere
    assert "Connection refused" in message
    assert "give --perceptual.weights FILE" in message
    assert not offline.exists()


def test_a_damaged_file_in_torchs_cache_is_not_used(offline: Path) -> None:
    offline.mkdir(parents=True)
    (offline / "vgg19-dcbb9e9d.pth").write_bytes(b"half of it")
    with pytest.raises(PerceptualWeightsError, match=r"vgg19-dcbb9e9d\.pth: its sha256 .* delete it"):
        load_vgg19_weights(PerceptualConfig())


def test_a_missing_file_is_said_with_its_path_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        PerceptualWeightsError, match=r"nowhere\.pth: there is no such file.*https://.*vgg19-"
    ) as failed:
        load_vgg19_weights(from_file(tmp_path / "nowhere.pth"))
    assert isinstance(failed.value.__cause__, OSError)
    with pytest.raises(PerceptualWeightsError, match="can't read https://"):
        load_vgg19_weights(from_file("https://example.org/vgg19.pth"))


def test_the_hash_that_is_asked_for_must_be_the_files(vgg19_file: Path) -> None:
    sha256 = sha256_of(vgg19_file)
    for right in (sha256, sha256[:8].upper()):
        checked = load_vgg19_weights(from_file(vgg19_file, sha256=right, layer=EARLY))
        assert checked.description == f"file vgg19.pth (sha256 {sha256[:8]}…)"
    with pytest.raises(PerceptualWeightsError, match=f"{sha256}, but --perceptual.weights-sha256 says 0123abcd"):
        load_vgg19_weights(from_file(vgg19_file, sha256="0123abcd"))


def test_the_hash_in_a_files_name_must_be_the_files(vgg19_file: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "vgg19-dcbb9e9d.pth"
    renamed.symlink_to(vgg19_file)
    with pytest.raises(PerceptualWeightsError, match="its name says dcbb9e9d: damaged, or another file"):
        load_vgg19_weights(from_file(renamed))


def test_weights_of_another_network_are_refused_with_what_differs(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """VGG16 shares its first seven convolutions with VGG19, names and shapes: also an early layer must not take it."""
    with torch.device("meta"):
        shapes = vgg16(weights=None).features.state_dict()
    other = {f"features.{key}": torch.zeros(1).expand(tensor.shape) for key, tensor in shapes.items()}
    nan = {**state, "features.2.bias": torch.full((64,), torch.nan)}
    for content, said in (
        (other, r"not VGG19's weights: missing: features\.16\.weight.* not of this network: features\.17\.weight"),
        ({**state, "features.0.weight": torch.zeros(8, 3, 3, 3)}, r"features\.0\.weight is \(8, 3, 3, 3\) instead of"),
        (nan, r"not finite: features\.2\.bias"),
        ({"classifier.0.weight": torch.zeros(3)}, "missing: features.0.weight"),
        (torch.zeros(3), "holds one Tensor"),
        ([1, 2], "holds one list"),
    ):
        with pytest.raises(PerceptualWeightsError, match=said):
            load_vgg19_weights(from_file(save_as(content, tmp_path / "other.pth"), layer=EARLY))


class MakesFolder:
    """Unpickling this makes a folder: what a malicious file would do is up to its author."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, state: dict[str, Tensor], container: str
) -> None:
    trap, path = tmp_path / "trap", tmp_path / "vgg19.pth"
    if container == "pickle":
        path.write_bytes(pickle.dumps(MakesFolder(trap), protocol=2))
    else:
        torch.save({"features.0.bias": state["features.0.bias"], "trap": MakesFolder(trap)}, path,
                   _use_new_zipfile_serialization=container == "zip")  # fmt: skip
    with pytest.raises(PerceptualWeightsError, match=r"would run code \(posix\.mkdir\); nothing was run"):
        load_vgg19_weights(from_file(path))
    assert not trap.exists()
    # The trap is a real one.
    pickle.loads(pickle.dumps(MakesFolder(trap)))
    assert trap.is_dir()


@pytest.mark.parametrize("suffix", ["pth", "legacy.pth", "safetensors"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_always_that_one_error(tmp_path: Path, suffix: str) -> None:
    """Cut anywhere, or with a few bytes changed: torch.load has a dozen ways to fail."""
    small = {f"features.{index}.bias": torch.arange(4.0) for index in range(5)}
    if suffix == "safetensors":
        whole = safetensors.torch.save(small)
    else:
        buffer = io.BytesIO()
        torch.save(small, buffer, _use_new_zipfile_serialization=suffix == "pth")
        whole = buffer.getvalue()
    path, rng = tmp_path / f"vgg19.{suffix}", random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        if rng.random() < 0.5:
            del damaged[rng.randrange(len(whole)) :]
        else:
            for _ in range(rng.randrange(1, 8)):
                damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        with pytest.raises(PerceptualWeightsError):
            load_vgg19_weights(from_file(path))


# --- random features


def test_random_features_are_asked_for_tagged_and_decided_by_the_seed_alone() -> None:
    config = PerceptualConfig(weights="random", layer="conv3_1")
    before = torch.random.get_rng_state()
    first, again, other = (load_vgg19_weights(config, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.is_random
    assert not first.is_official
    assert first.description == "random (seed 3)"
    assert all(torch.equal(first.state[key], again.state[key]) for key in first.state)
    assert not torch.equal(first.state["features.0.weight"], other.state["features.0.weight"])


def test_random_features_are_spread_as_torchvision_spreads_them() -> None:
    loaded = load_vgg19_weights(PerceptualConfig(weights="random", layer="conv4_1"))
    torch.manual_seed(0)
    with torch.device("meta"):
        reference = vgg19(weights=None).features[19]
    assert isinstance(reference, nn.Conv2d)
    reference = reference.to_empty(device="cpu")
    nn.init.kaiming_normal_(reference.weight, mode="fan_out", nonlinearity="relu")  # as torchvision.models.vgg.VGG does
    assert loaded.state["features.19.weight"].std() == pytest.approx(float(reference.weight.detach().std()), rel=0.01)
    assert torch.count_nonzero(loaded.state["features.19.bias"]) == 0


# --- AlexNet, for LPIPS, by the same loader


def test_alexnets_errors_name_its_own_flag_and_file(offline: Path, vgg19_file: Path) -> None:
    with pytest.raises(PerceptualWeightsError, match=r"--perceptual\.lpips-weights imagenet: .*alexnet-owt-"):
        load_alexnet_weights()
    with pytest.raises(PerceptualWeightsError, match=r"not AlexNet's weights.*give --perceptual\.lpips-weights FILE"):
        load_alexnet_weights(str(vgg19_file))


def test_alexnets_features_are_taken_and_the_global_generator_left_alone(tmp_path: Path) -> None:
    features = {f"features.{key}": tensor for key, tensor in alexnet(weights=None).features.state_dict().items()}
    path = save_as(features, tmp_path / "alexnet.pth")
    before = torch.random.get_rng_state()
    assert_same(load_alexnet_weights(str(path)).state, features)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_sent_to_a_worker_is_not_the_storage_of_a_whole_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in alexnet(weights=None).features.state_dict().items()}
    flat = torch.arange(sum(shape.numel() for shape in shapes.values()), dtype=torch.float32)
    views = flat.split([shape.numel() for shape in shapes.values()])
    state = {f"features.{key}": view.view(shape) for (key, shape), view in zip(shapes.items(), views, strict=True)}
    loaded = load_alexnet_weights(str(save_as(state, tmp_path / "views.pth"))).state
    assert_same(loaded, state)
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in loaded.values())


# --- the page that tells how


def test_the_pages_conversion_gives_a_file_that_is_taken(
    repo: Path, vgg19_file: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = (repo / "docs" / "perceptual.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "vgg19-dcbb9e9d.pth").symlink_to(vgg19_file)
    (tmp_path / "convert.py").write_text(script)
    runpy.run_path(str(tmp_path / "convert.py"))
    assert_same(load_vgg19_weights(from_file(tmp_path / "vgg19-features.safetensors")).state, state)
