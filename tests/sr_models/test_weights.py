"""Saving, loading, and starting one scale from another."""

import json

import pytest
import torch

from sr_models.architectures import ARCHITECTURES, build_model
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.srresnet import SRResNetConfig
from sr_models.weights import load_matching, load_model, save_model

TINY_CONFIGS = [
    *(EDSRConfig(scale=scale, num_blocks=2, num_channels=4) for scale in (2, 3, 4)),
    EDSRConfig(scale=4, num_blocks=1, num_channels=6, residual_scaling=0.1, rgb_range=1.0),
    *(SRResNetConfig(scale=scale, num_blocks=2, num_channels=4) for scale in (2, 3, 4)),
]
TINY = TINY_CONFIGS[0]


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    save_model(folder, TINY, build_model(TINY, seed=0).state_dict(), notes={"origin": "a test"})
    return folder


def test_every_architecture_has_a_tiny_config_here():
    assert {type(config) for config in TINY_CONFIGS} == {entry.config_type for entry in ARCHITECTURES.values()}


@pytest.mark.parametrize("config", TINY_CONFIGS, ids=str)
def test_what_is_saved_is_what_is_loaded(tmp_path, config):
    model = build_model(config, seed=1)
    save_model(tmp_path / "folder", config, model.state_dict())
    loaded = load_model(tmp_path / "folder")
    assert loaded.config == config
    assert not loaded.training
    lr_NCHW = torch.rand(1, 3, 5, 6)
    assert torch.equal(loaded(lr_NCHW), model.eval()(lr_NCHW))


def test_saving_the_weights_of_another_network_writes_nothing(tmp_path):
    wrapped = {f"module.{key}": tensor for key, tensor in build_model(TINY).state_dict().items()}
    with pytest.raises(ModelError, match=r"missing: head\.weight.* and \d+ more; not of this network: module\.head"):
        save_model(tmp_path / "folder", TINY, wrapped)
    assert not (tmp_path / "folder").exists()


def test_a_damaged_weights_file_is_named(saved):
    whole = (saved / "weights.safetensors").read_bytes()
    (saved / "weights.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ModelError, match=r"weights\.safetensors is not a whole safetensors file"):
        load_model(saved)


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ModelError, match=f"has no {name}"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document["config"].update(blocks=3), "config.json: .*unknown key 'blocks'"),
        (lambda document: document.update(architecture="vdsr"), "config.json: unknown architecture 'vdsr'"),
        (lambda document: document.pop("config"), 'the keys "architecture" and "config"'),
        (lambda document: document.update(config=[]), '"config" an object'),
        (lambda document: document["config"].update(num_blocks=3), r"missing: blocks\.2\.conv1\.weight"),
        (lambda document: document["config"].update(num_blocks=1), r"not of this network: .*blocks\.1\.conv1\.weight"),
        (lambda document: document["config"].update(num_channels=5), r"wrong shape: head\.weight is \(4, 3, 3, 3\)"),
    ],
)
def test_a_config_that_does_not_fit_says_what_is_wrong(saved, change, message):
    document = json.loads((saved / "config.json").read_text())
    change(document)
    (saved / "config.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=message):
        load_model(saved)


def test_a_config_that_is_not_json_is_named(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        load_model(saved)


def small_edsr(scale, **changes):
    return EDSRConfig(**{"scale": scale, "num_blocks": 2, "num_channels": 4, **changes})


@pytest.mark.parametrize(
    ("scale", "fresh", "unused"),
    [
        (3, {"upsampler.0.weight", "upsampler.0.bias"}, {"upsampler.0.weight", "upsampler.0.bias"}),
        (4, {"upsampler.2.weight", "upsampler.2.bias"}, set()),
    ],
)
def test_x3_and_x4_start_from_x2(scale, fresh, unused):
    source, model = build_model(small_edsr(2), seed=1), build_model(small_edsr(scale), seed=2)
    untouched = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load_matching(model, source.state_dict(), config=source.config)
    assert set(report.fresh) == fresh
    assert set(report.unused) == unused
    assert set(report.loaded) == set(model.state_dict()) - fresh
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key] if key in report.loaded else untouched[key])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 1}, r"besides the upsampler, blocks\.1\.conv1\.weight.* differ"),
        ({"num_channels": 5}, r"besides the upsampler, head\.weight.* differ"),
    ],
)
def test_a_different_body_is_refused_and_nothing_is_copied(changes, message):
    source, model = build_model(small_edsr(2, **changes), seed=1), build_model(small_edsr(4), seed=2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        load_matching(model, source.state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_values_that_no_tensor_shows_are_compared():
    source, model = build_model(small_edsr(2, residual_scaling=0.1)), build_model(small_edsr(4))
    with pytest.raises(ModelError, match=r"weights of residual_scaling=0\.1: the network has residual_scaling=1\.0"):
        load_matching(model, source.state_dict(), config=source.config)
