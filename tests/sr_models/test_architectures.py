"""Networks by name, reproducible initialisation, configs as plain values."""

import json

import pytest
import torch

from sr_models.architectures import ARCHITECTURES, architecture_name, build_model, config_from_dict, config_to_dict
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError

TINY = EDSRConfig(scale=3, num_blocks=1, num_channels=4, residual_scaling=0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_builds_from_its_defaults_and_knows_its_name(name):
    config = ARCHITECTURES[name].config_type()
    assert architecture_name(config) == name
    with torch.device("meta"):
        assert build_model(config).config == config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_config_survives_json(name):
    config = ARCHITECTURES[name].config_type()
    assert config_from_dict(name, json.loads(json.dumps(config_to_dict(config)))) == config
    assert config_from_dict("edsr", json.loads(json.dumps(config_to_dict(TINY)))) == TINY


def test_a_seed_alone_decides_the_weights_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = (build_model(TINY, seed=seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("resnet", {}, "unknown architecture 'resnet'; there are: .*edsr"),
        ("edsr", {"num_block": 3}, "unknown key 'num_block'; there are: .*num_blocks"),
        ("edsr", {"num_blocks": "3"}, "num_blocks='3' is not of type int"),
        ("edsr", {"num_blocks": True}, "num_blocks=True is not of type int"),
        ("edsr", {"scale": 5}, "scale=5 is not of type one of 2, 3, 4"),
        ("edsr", {"num_blocks": 0}, "must be at least 1"),
    ],
)
def test_wrong_values_are_named(name, values, message):
    with pytest.raises(ModelError, match=message):
        config_from_dict(name, values)


def test_a_foreign_config_is_refused():
    with pytest.raises(ModelError, match=r"int is no architecture's config; there are: .*EDSRConfig"):
        build_model(3)
