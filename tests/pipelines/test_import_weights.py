"""Importing a file: registered and loaded back it gives what the authors' network gives; nothing in a file is run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pickletools
import zipfile
from functools import partial
from pathlib import Path

import mlflow.artifacts
import numpy as np
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient

from pipelines import promote_model
from pipelines.evaluate_model import main as evaluate_main
from pipelines.import_weights import main
from sr_data.storage import open_store
from sr_models.inference import upscale_image
from sr_serve.score_tags import read_score_tags
from sr_train.upscaler import open_network
from tests.support.foreign import BasicSrEdsr, EdsrPyTorch, SrganPyTorch

LR_HWC = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)


@pytest.fixture
def import_weights(run_main):
    """The script with these arguments, on the CPU."""
    return partial(run_main, main, "--device", "cpu")


@pytest.fixture
def look(import_weights):
    """The script, without a registry."""
    return partial(import_weights, "--no-register")


def edsr(**changes: object) -> EdsrPyTorch:
    torch.manual_seed(0)
    return EdsrPyTorch(**{"scale": 2, **changes})


def saved(content: object, name: str = "weights.pt") -> Path:
    torch.save(content, name)
    return Path(name)


@torch.no_grad()
def authors_image(theirs: torch.nn.Module) -> np.ndarray:
    """What the other project makes of `LR_HWC`, as uint8."""
    sr_NCHW = theirs.upscale(torch.from_numpy(LR_HWC).permute(2, 0, 1).unsqueeze(0) / 255.0)
    return (sr_NCHW[0].permute(1, 2, 0) * 255.0).round().clamp(0, 255).to(torch.uint8).numpy()


def assert_same_image(model: str, theirs: torch.nn.Module, **options: str) -> None:
    ours = upscale_image(open_network(model, **options), LR_HWC).astype(int)
    assert np.abs(ours - authors_image(theirs)).max() <= 1  # a value half way between two levels may go either way
    assert (ours != authors_image(theirs)).mean() < 0.001


def test_a_registered_import_gives_what_the_authors_network_gives(import_weights, run_main, mlflow_server, tiny_photos):
    theirs = edsr()
    file = saved(theirs.state_dict(), "edsr_theirs_x2.pt")
    options = ("--architecture", "edsr", "--scale", 2, "--tracking-uri", mlflow_server.uri, "--register-as", "imported")
    sets = ("--sets", f"{tiny_photos},builtin://photos", "--protocol", "psnr@rgb,crop=scale")
    status, out, err = import_weights(
        file, *options, *sets, "--licence", "MIT, weights trained on DIV2K", "--invents-detail"
    )
    assert status == 0, err
    assert "EDSR-PyTorch's EDSR" in out
    assert "num_blocks 2, num_channels 6, residual_scaling 1.0, rgb_range 255.0" in out
    assert out.splitlines()[-1] == "registered  models:/imported/1 (imported@challenger)"

    assert_same_image("models:/imported@challenger", theirs, tracking_uri=mlflow_server.uri)
    version = MlflowClient(mlflow_server.uri).get_model_version_by_alias("imported", "challenger")
    tags = version.tags
    assert tags["source_file"] == file.name
    assert tags["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert tags["source_layout"].startswith("EDSR-PyTorch")
    assert tags["licence"] == "MIT, weights trained on DIV2K"
    assert "not_promotable" not in tags
    scores = read_score_tags(tags)
    assert [(it.set, it.images, it.protocol) for it in scores] == [
        ("photos", 1, "psnr@rgb,crop=scale"),
        ("tiny_photos", 6, "psnr@rgb,crop=scale"),
    ]
    assert float(tags["psnr_db"]) == pytest.approx(scores[1].psnr_db, abs=1e-4)
    assert f"{scores[0].psnr_db:.3f}" in out
    folder = Path(
        mlflow.artifacts.download_artifacts(version.source, tracking_uri=mlflow_server.uri, dst_path="version")
    )
    [card] = [path.read_text() for path in folder.rglob("MODEL_CARD.md")]
    assert "MIT, weights trained on DIV2K" in card
    assert file.name in card
    assert "trained to look right" in card

    # No checkpoint was chosen by the set that it was scored on, so nothing speaks against comparing it there.
    compared = run_main(
        promote_model.main, "imported", "--sets", tiny_photos, "--dry-run", "--tracking-uri", mlflow_server.uri
    )
    assert compared.status in (0, 1), compared.err
    assert "warning" not in compared.err


def test_from_object_storage_to_a_folder_that_scores_the_same(look, run_main, s3, tiny_photos):
    torch.manual_seed(0)
    theirs = SrganPyTorch(scale=2)
    buffer = io.BytesIO()
    torch.save({"epoch": 7, "state_dict": theirs.state_dict()}, buffer)
    store = open_store(f"{s3.new_bucket()}/weights")
    store.write("SRResNet_x2.pth.tar", buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    uri, sets = store.uri_of("SRResNet_x2.pth.tar"), ("--sets", tiny_photos, "--scale", 2)
    status, out, err = look(uri, "--architecture", "srresnet", *sets, "--sha256", digest[:12].upper(), "--save", "ours")
    assert status == 0, err
    assert "taken: 'state_dict'; left: epoch" in out
    assert_same_image("ours", theirs)
    assert json.loads(Path("ours/config.json").read_text())["notes"]["source_sha256"] == digest
    assert not Path("mlflow.db").exists()

    status, evaluated, err = run_main(evaluate_main, "ours", *sets, "--device", "cpu")
    assert status == 0, err
    [ours] = [line.split()[1] for line in evaluated.splitlines() if line.startswith("ours ")]
    assert ours in out


def test_safetensors_are_read_whatever_the_name(look):
    torch.manual_seed(0)
    theirs = BasicSrEdsr(scale=2)
    safetensors.torch.save_file(theirs.state_dict(), "weights.bin")
    status, _, err = look("weights.bin", "--architecture", "edsr", "--scale", 2, "--save", "ours")
    assert status == 0, err
    assert_same_image("ours", theirs)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def zipped(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def legacy(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def script() -> bytes:
    """What torch takes for a TorchScript archive: it goes by the name of one member."""
    buffer = io.BytesIO(zipped({}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/constants.pkl", pickle.dumps(()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: zipped({**edsr().state_dict(), "more": Hostile()}), "would run code from outside this file"),
        (lambda: legacy({"params": edsr().state_dict(), "more": Hostile()}), "would run code from outside this file"),
        (lambda: pickle.dumps(Hostile()), "refused, because"),
        (lambda: zipped({"epoch": 1, "model": edsr()}), "(tests.support.foreign.EdsrPyTorch)"),
        (script, "TorchScript"),
    ],
)
def test_nothing_in_a_file_is_run(look, content, message):
    Path("weights.pt").write_bytes(content())
    status, out, err = look("weights.pt", "--architecture", "edsr", "--scale", 2)
    assert (status, out) == (2, "")
    assert err.startswith("error: weights.pt: refused, because")
    assert message in err
    assert "torch.save(network.state_dict()" in err
    assert not Path("executed").exists()
    pickle.loads(pickle.dumps(Hostile()))  # what would have happened
    assert Path("executed").is_dir()


def repeated() -> bytes:
    """2 kB, of which torch makes a tensor of 10^13 elements."""
    return zipped({**edsr().state_dict(), "tail.1.bias": torch.zeros(1).expand(10**13)})


def inflated() -> bytes:
    """An archive that says that it unpacks to 5 GiB."""
    buffer = io.BytesIO(zipped(edsr().state_dict()))
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more", bytes(1000))
        archive.getinfo("more").file_size = 5 * 2**30
    return buffer.getvalue()


def unbacked() -> bytes:
    """In the old format: a tensor of 4 GB, and the list of what is stored behind it is empty."""
    buffer = io.BytesIO(
        legacy({"w": torch.zeros(7)}).replace(b"cpuq\x06K\x07", b"cpuq\x06J" + (10**9).to_bytes(4, "little"))
    )
    for _ in range(4):  # magic number, version, facts of the machine, the tensors
        for _ in pickletools.genops(buffer):
            pass
    return buffer.getvalue()[: buffer.tell()] + pickle.dumps([], protocol=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (repeated, "weights.pt: tensors with more elements than numbers, which no network saves: tail.1.bias"),
        (inflated, "weights.pt: holds 5.0 GiB, more than the 4 that a file of weights may have"),
        (unbacked, "weights.pt: damaged, or"),
    ],
)
def test_a_small_file_that_asks_for_much_memory_is_refused(look, content, message):
    Path("weights.pt").write_bytes(content())
    assert Path("weights.pt").stat().st_size < 100_000
    status, out, err = look("weights.pt", "--architecture", "edsr", "--scale", 2)
    assert (status, out) == (2, "")
    assert message in err


def test_a_file_that_is_too_large_is_not_read(look):
    with Path("weights.pt").open("wb") as file:
        file.truncate(5 * 2**30)  # without any block on the disk
    status, _, err = look("weights.pt", "--architecture", "edsr", "--scale", 2)
    assert status == 2
    assert "weights.pt: holds 5.0 GiB, more than the 4" in err


@pytest.mark.parametrize("write", [zipped, legacy, lambda state: safetensors.torch.save(dict(state))])
def test_a_truncated_file_is_named(look, write):
    whole = write(edsr().state_dict())
    Path("weights.pt").write_bytes(whole[: len(whole) // 2])
    status, _, err = look("weights.pt", "--architecture", "edsr", "--scale", 2)
    assert status == 2
    assert "error: weights.pt: damaged, or no file of weights" in err
    assert hashlib.sha256(whole[: len(whole) // 2]).hexdigest() in err


def test_a_pointer_of_git_lfs_is_named(look):
    Path("weights.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5490680\n")
    status, _, err = look("weights.pt", "--architecture", "edsr", "--scale", 2)
    assert status == 2
    assert "weights.pt: is a Git LFS pointer" in err


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({"--scale": 4}, ["weights.pt: it is an x2 network, not x4", "--scale"]),
        ({"--architecture": "srresnet"}, ["weights.pt: it is EDSR-PyTorch's EDSR", "--architecture edsr"]),
        ({"--architecture": "vdsr"}, ["edsr", "srresnet"]),
        ({"--sha256": "0123456789"}, ["weights.pt: its sha256 is ", "--sha256 says 0123456789"]),
        ({"--sha256": "0123"}, ["--sha256 '0123'", "8 to 64 hex digits"]),
        ({"--rgb-range": 1}, ["weights.pt: the file's mean shift", "--rgb-range"]),
        ({"--entry": "params"}, ["weights.pt: has no tensors under 'params'", "--entry"]),
        ({"--sets": "nowhere"}, ["nowhere", "--sets"]),
        ({"--protocol": "ssim"}, ["'ssim'"]),
        ({"--register-as": "a/b"}, ["--register-as 'a/b'"]),
        ({"--alias": "v1"}, ["--alias 'v1'"]),
        ({"--alias": "champion"}, ["--alias champion", "promote_model.py"]),
        ({"--device": "cuda:99"}, ["cuda:99", "--device"]),
        ({"--device": "gpu"}, ["gpu: is no device", "--device"]),
        ({"--licence": " "}, ["--licence"]),
        ({"--save": "."}, ["--save .: must be a folder on this machine, new or empty"]),
        ({"file": "no.pt"}, ["no.pt", "no such file"]),
    ],
)
def test_mistakes_are_named(look, changed, messages):
    saved(edsr().state_dict())
    options = {"file": "weights.pt", "--architecture": "edsr", "--scale": 2, **changed}
    status, _, err = look(options.pop("file"), *(part for option in options.items() for part in option))
    assert status == 2
    assert all(message in err for message in messages), err


def test_what_was_refused_leaves_no_folder_to_be_in_the_way(import_weights, mlflow_server):
    """MLflow tells only at the end that an experiment is deleted."""
    file, client = saved(edsr().state_dict()), MlflowClient(mlflow_server.uri)
    client.delete_experiment(client.create_experiment("deleted"))
    options = ("--architecture", "edsr", "--scale", 2, "--save", "new/ours", "--tracking-uri", mlflow_server.uri)
    refused = import_weights(file, *options, "--register-as", "saved", "--experiment", "deleted")
    assert refused.status == 2
    assert "PSNR" in refused.out, "scored before"
    assert list(Path("new").iterdir()) == []
    done = import_weights(file, *options, "--register-as", "saved")
    assert done.status == 0, done.err
    assert done.out.endswith("saved       new/ours\n")
    assert {path.name for path in Path("new").rglob("*")} == {"ours", "config.json", "weights.safetensors"}


def test_a_registry_that_is_away_shows_before_scoring(import_weights, monkeypatch):
    saved(edsr().state_dict())
    address = "http://127.0.0.1:9"  # the discard port: nobody listens
    status, out, err = import_weights("weights.pt", "--architecture", "edsr", "--scale", 2, "--tracking-uri", address)
    assert status == 2
    assert address in err
    assert "PSNR" not in out


def test_a_hash_in_the_name_that_is_not_the_files_is_a_warning(look):
    state = edsr().state_dict()
    saved(state, "edsr_x2-01234567.pt")
    assert "begins with 01234567" in look("edsr_x2-01234567.pt", "--architecture", "edsr", "--scale", 2).out
    named = f"edsr_x2-{hashlib.sha256(Path('edsr_x2-01234567.pt').read_bytes()).hexdigest()[:8]}.pt"
    Path("edsr_x2-01234567.pt").rename(named)
    assert "WARNING" not in look(named, "--architecture", "edsr", "--scale", 2).out


def test_a_network_that_gives_another_picture_is_not_imported_unless_asked(import_weights, mlflow_server):
    """A wrong residual_scaling shows in no key and no shape."""
    file = saved(edsr().state_dict())
    wrong = ("--architecture", "edsr", "--scale", 2, "--residual-scaling", 40)
    target = ("--tracking-uri", mlflow_server.uri, "--register-as", "imported-poor")
    status, out, err = import_weights(file, *wrong, *target)
    assert status == 2
    assert "a smooth picture comes out at" in err
    assert "--residual-scaling" in err
    assert "--allow-poor" in err
    client = MlflowClient(mlflow_server.uri)
    assert not client.search_registered_models("name = 'imported-poor'")

    status, out, err = import_weights(file, *wrong, *target, "--allow-poor")
    assert status == 0, err
    assert "WARNING" in out
    assert "models:/imported-poor/1, without an alias" in out
    assert client.get_registered_model("imported-poor").aliases == {}
    assert "smooth picture" in client.get_model_version("imported-poor", "1").tags["not_promotable"]
