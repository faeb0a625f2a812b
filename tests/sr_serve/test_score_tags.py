"""Scores as tags of a version: what a registry takes comes back as it was."""

from dataclasses import replace

import pytest
from mlflow import MlflowClient

from sr_serve.score_tags import ScoreTag, read_score_tags, write_score_tags
from sr_train.metrics import PROTOCOLS
from sr_train.tracking_server import TrackingError

TAG = ScoreTag(
    set="Set5",
    scale=4,
    protocol="psnr@y,crop=scale",
    psnr_db=30.25,
    ssim=0.875,
    bicubic_psnr_db=28.5,
    bicubic_ssim=0.75,
    images=5,
    fingerprint="0123456789abcdef",
    evaluated="2026-01-02T03:04:05+00:00",
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """The URI of an empty one."""
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture
def version(registry, tmp_path, request):
    """The first version of a model named like the test: (client, tracking URI, name)."""
    client, name = MlflowClient(registry, registry), request.node.name
    client.create_registered_model(name)
    client.create_model_version(name, source=str(tmp_path))
    return client, registry, name


def test_what_is_written_is_read_back_whatever_the_set_is_called(version):
    client, uri, name = version
    tags = [
        TAG,
        *(replace(TAG, protocol=protocol) for protocol in PROTOCOLS if protocol != TAG.protocol),
        replace(TAG, scale=2, psnr_db=None, bicubic_psnr_db=None),
        replace(TAG, self_ensemble=True),
        *(replace(TAG, set=name) for name in ("Übung, №5", "Übung, №6", "..", "a" * 300, "a" * 301, "x.x4", "x x4")),
    ]
    write_score_tags(uri, name=name, version="1", tags=tags)
    client.set_model_version_tag(name, "1", "score.of-mine", "30 dB")
    client.set_model_version_tag(name, "1", "score.json", '{"set": "Set5"}')
    client.set_model_version_tag(name, "1", "psnr_db", "30")
    kept = client.get_model_version(name, "1").tags
    assert kept["score.Set5.x4.psnr_y_crop_scale"] == TAG.value
    read = read_score_tags(kept)
    assert len(read) == len(tags)
    assert {tag.key: tag for tag in read} == {tag.key: tag for tag in tags}
    assert all(isinstance(tag.scale, int) for tag in read)


def test_a_later_evaluation_replaces_the_earlier(version):
    client, uri, name = version
    later = replace(TAG, psnr_db=30.5, fingerprint="fedcba9876543210")
    for tag in (TAG, later):
        write_score_tags(uri, name=name, version="1", tags=[tag])
    assert read_score_tags(client.get_model_version(name, "1").tags) == [later]


def test_a_field_that_came_later_does_not_hide_a_score():
    assert read_score_tags({TAG.key: TAG.value.replace("{", '{"lpips": 0.1, ', 1)}) == [TAG]


def test_a_version_that_is_not_there_is_a_tracking_error(version):
    _, uri, name = version
    with pytest.raises(TrackingError, match="mlflow.db"):
        write_score_tags(uri, name=name, version="2", tags=[TAG])
