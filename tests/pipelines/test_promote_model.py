"""Versions of one colour in a real registry, which become champion or don't."""

import errno
import itertools
import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlflow.artifacts
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.models import Model
from PIL import Image

from pipelines import evaluate_model, promote_model
from sr_data.manifest import load_manifest
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.weights import save_model
from sr_train.model_registry import register_model
from sr_train.tracking import start_run
from tests.pipelines.conftest import Outcome
from tests.sr_train.test_champion import save_grey
from tests.support.mlflow_server import MlflowServer

WHITE, LIGHT, GREY, NEARLY_GREY = "white", "light", "grey", "nearly grey"
"""The photos are about as bright as GREY; NEARLY_GREY is better on some of them and worse on others."""
LEVELS = {WHITE: 255, LIGHT: 190, GREY: 128, NEARLY_GREY: 134}
X4 = "x4"
LR_HWC = np.zeros((8, 8, 3), np.uint8)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def client(mlflow_server: MlflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.uri, mlflow_server.uri)


@pytest.fixture(scope="module")
def sources(mlflow_server: MlflowServer, client: MlflowClient, tmp_path_factory: pytest.TempPathFactory):
    """What a version of each kind is made from. One is registered; the others are its copies with other weights."""
    folder = tmp_path_factory.mktemp("promoted")
    run = start_run(tracking_uri=mlflow_server.uri, experiment="promote", run_name="r", params={}, tags={}, texts={})
    for kind, level in LEVELS.items():
        save_grey(folder / kind, level)
    config = EDSRConfig(scale=4, num_blocks=1, num_channels=4)
    save_model(folder / X4, config, build_model(config, seed=0).state_dict())
    made = register_model(run, folder / GREY, name="promoted-from", tags={}, sample_lr_HWC=LR_HWC)
    source = client.get_model_version(made.name, made.version).source
    packed = Path(mlflow.artifacts.download_artifacts(source, dst_path=folder, tracking_uri=mlflow_server.uri))
    weights = packed / Model.load(packed).flavors["python_function"]["artifacts"]["model"]["path"]
    shutil.rmtree(packed / "code")  # most of the files, and none that is read here
    sources = {}
    for kind in (*LEVELS, X4):
        for path in (folder / kind).iterdir():
            shutil.copy(path, weights / path.name)
        logged = client.create_logged_model(run.experiment_id, source_run_id=run.run_id)
        client.log_model_artifacts(logged.model_id, str(packed))
        client.finalize_logged_model(logged.model_id, "READY")
        sources[kind] = {"source": logged.artifact_location, "run_id": run.run_id, "model_id": logged.model_id}
    return sources


class Registered:
    """A registered model of a test's own."""

    def __init__(self, client: MlflowClient, sources: dict[str, dict[str, str]]) -> None:
        self.name = f"promoted-{next(_numbers)}"
        self._client, self._sources = client, sources
        client.create_registered_model(self.name)

    def add(self, kind: str, **tags: str) -> str:
        """A further version with the files of a registered one; the challenger."""
        version = self._client.create_model_version(self.name, **self._sources[kind], tags=tags).version
        self.set("challenger", version)
        return str(version)

    def set(self, alias: str, version: str) -> None:
        self._client.set_registered_model_alias(self.name, alias, version)

    @property
    def champion(self) -> str | None:
        version = self._client.get_registered_model(self.name).aliases.get("champion")
        return None if version is None else str(version)

    def tags(self, version: str) -> dict[str, str]:
        return self._client.get_model_version(self.name, version).tags


@pytest.fixture
def model(client: MlflowClient, sources) -> Registered:
    """Without any version yet."""
    return Registered(client, sources)


@pytest.fixture
def promote(run_main, mlflow_server: MlflowServer, tiny_photos: Path) -> Callable[..., Outcome]:
    """The script on the six photos, or as the arguments say."""

    def run(model: Registered, *arguments: object) -> Outcome:
        scoring: list[object] = []
        if not {"--scores", "--rollback"} & set(map(str, arguments)):
            scoring = ["--device", "cpu", *([] if "--sets" in arguments else ["--sets", tiny_photos])]
        return run_main(promote_model.main, model.name, *scoring, *arguments, "--tracking-uri", mlflow_server.uri)

    return run


def test_better_is_promoted_noise_and_worse_are_not(promote, model: Registered, tiny_photos: Path) -> None:
    model.set("champion", model.add(WHITE))
    model.add(GREY)
    dry = promote(model, "--dry-run")
    assert (dry.status, model.champion, set(model.tags("2"))) == (0, "1", set())
    assert "Would be promoted, but nothing was moved (--dry-run): version 2 is better than version 1: +" in dry.out
    done = promote(model)
    assert (done.status, model.champion) == (0, "2"), done.err
    heading, columns, row, sentence = done.out.splitlines()
    assert heading == f"{model.name}  x2  psnr@y,crop=scale  PSNR in dB"
    assert "version 2  version 1  difference" in columns and row.endswith("better")
    name, images, ours_db, theirs_db, gain_db, low_db, _, high_db, _ = row.split()
    assert (name, images) == ("tiny_photos", "6")
    assert float(gain_db) == pytest.approx(float(ours_db) - float(theirs_db), abs=0.0011)
    assert 0 < float(low_db) < float(gain_db) < float(high_db)
    assert sentence.startswith(f"Promoted: version 2 is better than version 1: {gain_db} dB, 95 % confidence {low_db}")
    assert sentence.endswith(f"{model.name}@champion is version 2 now.")

    again = promote(model)
    assert (again.status, again.out) == (1, f"Nothing to do: models:/{model.name}/2 is the champion.\n")
    for kind, reason in [
        (GREY, "is not shown to be better than version 2: +0.000 dB"),
        (NEARLY_GREY, "is not shown to be better than version 2: "),
        (WHITE, "is worse than version 2: -"),
    ]:
        version = model.add(kind)
        kept = promote(model)
        assert (kept.status, model.champion, set(model.tags(version))) == (1, "2", set())
        assert f"Not promoted: version {version} {reason}" in kept.out
        assert kept.out.endswith("; version 2 stays champion.\n")


def test_the_promoted_version_says_why(promote, model: Registered, tiny_photos: Path, tmp_path: Path) -> None:
    model.set("champion", model.add(WHITE))
    model.add(GREY)
    (tmp_path / "few").mkdir()
    for level in (100, 110, 120, 130, 140):
        noisy_HWC = np.random.default_rng(level).normal(level, 9, (40, 40, 3)).clip(0, 255)
        Image.fromarray(noisy_HWC.astype(np.uint8)).save(tmp_path / f"few/{level}.png")
    sets = f"{tiny_photos},{tmp_path / 'few'}"
    outcome = promote(model, "--sets", sets, "--protocol", "psnr@rgb,crop=scale", "--min-gain-db", 0.5)
    assert outcome.status == 0, outcome.err
    tags = model.tags("2")
    assert tags["champion_before"] == "1" and tags["promoted_at"].startswith("20")
    record = json.loads(tags["promotion"])
    assert (record["against"], record["metric"], record["min_gain"], record["scale"]) == ("1", "psnr", 0.5, 2)
    assert (record["protocol"], record["images"]) == ("psnr@rgb,crop=scale", 11)
    fingerprints = {
        uri.name: load_manifest(str(uri), split="test", scale=2).fingerprint for uri in (tiny_photos, tmp_path / "few")
    }
    assert {it["set"]: it["fingerprint"] for it in record["sets"]} == fingerprints
    low_db, high_db = record["interval"]
    assert 0.5 < low_db < record["gain"] < high_db
    assert record["gain"] == pytest.approx(record["challenger"] - record["champion"])
    assert [row.split()[0] for row in outcome.out.splitlines()[2:5]] == ["tiny_photos", "few", "all"]


def test_a_set_that_is_worse_forbids_it(promote, model: Registered, tiny_photos: Path, tmp_path: Path) -> None:
    """Light images, of which white is nearer than grey."""
    (tmp_path / "light").mkdir()
    for seed in range(6):
        noisy_HWC = np.random.default_rng(seed).normal(197, 9, (40, 40, 3)).clip(0, 255)
        Image.fromarray(noisy_HWC.astype(np.uint8)).save(tmp_path / f"light/{seed}.png")
    model.set("champion", model.add(WHITE))
    model.add(GREY)
    outcome = promote(model, "--sets", f"{tiny_photos},{tmp_path / 'light'}")
    assert (outcome.status, model.champion) == (1, "1")
    assert "is better than version 1 on the whole (+" in outcome.out
    assert ", but worse on light (-" in outcome.out


def test_the_first_champion_must_be_better_than_bicubic(
    promote, model: Registered, tiny_photos: Path, tmp_path: Path
) -> None:
    model.add(GREY)
    refused = promote(model)
    assert (refused.status, model.champion) == (1, None)
    assert f"{model.name} has no champion yet: version 1 is compared with bicubic.\n" in refused.out
    assert "version 1 is worse than bicubic: -" in refused.out and "; no version is champion." in refused.out
    for folder in ("dark/HR", "dark/LR_bicubic/X2"):
        (tmp_path / folder).mkdir(parents=True)
    for path in tiny_photos.iterdir():  # bicubic makes black of these LR images
        shutil.copy(path, tmp_path / "dark/HR")
        with Image.open(path) as image:
            small = Image.new("RGB", (image.width // 2, image.height // 2))
        small.save(tmp_path / f"dark/LR_bicubic/X2/{path.stem}x2.png")
    promoted = promote(model, "--sets", tmp_path / "dark")
    assert (promoted.status, model.champion) == (0, "1")
    assert "Promoted: version 1 is better than bicubic: +" in promoted.out
    tags = model.tags("1")
    assert json.loads(tags["promotion"])["against"] == "bicubic" and "champion_before" not in tags
    back = promote(model, "--rollback")
    assert (back.status, model.champion) == (2, "1")
    assert f"models:/{model.name}/1 is the first champion (--rollback)" in back.err


def test_rollback_walks_back_and_a_newer_version_follows(promote, model: Registered) -> None:
    model.set("champion", model.add(WHITE))
    for kind in (LIGHT, GREY):
        model.add(kind)
        assert promote(model).status == 0
    dry = promote(model, "--rollback", "--dry-run")
    assert (dry.status, model.champion) == (0, "3")
    assert dry.out == (
        f"Would move {model.name}@champion from version 3 back to version 2; nothing was moved (--dry-run).\n"
    )
    back = promote(model, "--rollback")
    assert (back.status, model.champion) == (0, "2")
    assert back.out == f"Moved {model.name}@champion from version 3 back to version 2.\n"
    by_alias = promote(model)  # the challenger is version 3 still: no job that runs every night brings it back
    assert (by_alias.status, model.champion) == (2, "2")
    assert "was rolled back at" in by_alias.err and "--challenger 3" in by_alias.err
    model.add(NEARLY_GREY)
    assert (promote(model).status, model.champion) == (0, "4")
    moves = []
    while (outcome := promote(model, "--rollback")).status == 0:
        moves.append(model.champion)
    assert (moves, outcome.status, model.champion) == (["2", "1"], 2, "1")
    assert f"models:/{model.name}/1 is champion and there is none to go back to" in outcome.err
    by_number = promote(model, "--challenger", 3)
    assert (by_number.status, model.champion) == (0, "3")
    assert "rolled_back_at" not in model.tags("3") and model.tags("3")["champion_before"] == "1"


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """`meanwhile(act)`: that happens to the registry while the script is scoring."""

    def during_scoring(act: Callable[[], None]) -> None:
        original = promote_model.decide

        def slow(*arguments, **options):
            act()
            return original(*arguments, **options)

        monkeypatch.setattr(promote_model, "decide", slow)

    return during_scoring


def test_a_champion_that_someone_else_moved_meanwhile_is_left_alone(promote, model: Registered, meanwhile) -> None:
    model.set("champion", model.add(WHITE))
    model.add(WHITE)
    model.add(GREY)
    meanwhile(lambda: model.set("champion", "2"))
    outcome = promote(model)
    assert (outcome.status, model.champion, model.tags("3")) == (2, "2", {})
    assert f"{model.name}@champion is at version 2 now, not at version 1: someone else moved it" in outcome.err
    assert "Nothing was moved" in outcome.err


def test_a_move_between_the_last_look_and_the_alias_leaves_no_tags(promote, model: Registered, monkeypatch) -> None:
    """The challenger's tags are written first; a move by someone else at that moment takes them off again."""
    model.set("champion", model.add(WHITE))
    model.add(WHITE)
    model.add(GREY, kept="as it was")
    original = MlflowClient.set_model_version_tag

    def someone_else(self, name, version, key, value):
        original(self, name, version, key, value)
        if key == "promotion":
            model.set("champion", "2")

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", someone_else)
    outcome = promote(model)
    assert (outcome.status, model.champion, model.tags("3")) == (2, "2", {"kept": "as it was"})


def test_a_challenger_that_was_forbidden_while_it_was_scored_stays_one(promote, model: Registered, client, meanwhile):
    model.set("champion", model.add(WHITE))
    model.add(GREY)
    meanwhile(lambda: client.set_model_version_tag(model.name, "2", "not_promotable", "its licence"))
    outcome = promote(model)
    assert (outcome.status, model.champion, model.tags("2")) == (2, "1", {"not_promotable": "its licence"})
    assert "must never become champion: its licence" in outcome.err


def test_what_came_and_went_while_it_was_scored_stays_in_the_history(promote, model: Registered, client, meanwhile):
    model.set("champion", model.add(WHITE))
    model.add(GREY)

    def there_and_back() -> None:
        client.set_model_version_tag(model.name, "2", "champion_before", "1")
        client.set_model_version_tag(model.name, "1", "champion_before", "2")

    meanwhile(there_and_back)
    assert promote(model).status == 0
    assert model.tags("2")["champion_before"] == "1,1"


def test_a_rollback_that_is_cut_off_is_not_undone_by_the_next_promotion(
    promote, model: Registered, monkeypatch
) -> None:
    model.set("champion", model.add(WHITE))
    model.add(GREY)
    assert promote(model).status == 0
    original = MlflowClient.set_registered_model_alias

    def cut_off(self, name, alias, version):
        original(self, name, alias, version)
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_registered_model_alias", cut_off)
        outcome = promote(model, "--rollback")
    assert (outcome.status, model.champion) == (2, "1")
    assert "Connection reset" in outcome.err
    by_alias = promote(model)
    assert (by_alias.status, model.champion) == (2, "1")
    assert "was rolled back at" in by_alias.err


def test_a_rollback_that_someone_else_was_faster_than_marks_nothing(promote, model: Registered, monkeypatch) -> None:
    model.set("champion", model.add(WHITE))
    model.add(GREY)
    assert promote(model).status == 0
    before = model.tags("2")
    original = MlflowClient.set_model_version_tag

    def someone_else(self, name, version, key, value):
        original(self, name, version, key, value)
        model.set("champion", "1")

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", someone_else)
    outcome = promote(model, "--rollback")
    assert (outcome.status, model.champion, model.tags("2")) == (2, "1", before)
    assert "Nothing was moved" in outcome.err


def test_scores_from_files_decide_as_scores_made_now(
    promote, model: Registered, run_main, tiny_photos: Path, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    model.set("champion", model.add(WHITE))
    model.add(GREY)
    scored_now = promote(model, "--dry-run")
    place = ("--sets", tiny_photos, "--tracking-uri", mlflow_server.uri, "--device", "cpu")
    evaluate = partial(run_main, evaluate_model.main)
    for alias in ("challenger", "champion"):
        done = evaluate(f"models:/{model.name}@{alias}", *place, "--json", tmp_path / f"{alias}.json")
        assert done.status == 0, done.err
    files = (tmp_path / "challenger.json", tmp_path / "champion.json")
    assert promote(model, "--scores", *files, "--dry-run").out == scored_now.out
    swapped = promote(model, "--scores", *reversed(files))
    assert swapped.status == 2
    assert f"champion.json: holds no scores of models:/{model.name}/2" in swapped.err
    assert promote(model, "--scores", *files).status == 0
    assert model.champion == "2"


def test_what_must_not_be_promoted_or_compared(promote, model: Registered, tiny_photos: Path, tmp_path: Path) -> None:
    nothing = promote(model)
    assert nothing.status == 2 and f"has no registered model '{model.name}' with a version" in nothing.err
    fingerprint = load_manifest(str(tiny_photos), split="test", scale=2).fingerprint
    model.set("champion", model.add(WHITE))
    model.add(GREY, not_promotable="its weights may not be used so")
    model.add(GREY, dataset_fingerprint=fingerprint)
    model.add(X4)
    model.add(GREY, validation_fingerprint=fingerprint)
    (tmp_path / "five").mkdir()
    for path in sorted(tiny_photos.iterdir())[:5]:
        (tmp_path / "five" / path.name).write_bytes(path.read_bytes())
    for arguments, message in [
        (["--challenger", "2"], "must never become champion: its weights may not be used so"),
        (["--challenger", "3"], f"tiny_photos (fingerprint {fingerprint}) is what models:/{model.name}/3 was trained"),
        (["--challenger", "4"], f"models:/{model.name}/4 is an x4 model: different scales can't be compared"),
        (["--challenger", "9"], "has no version 9 (--challenger); it has 1, 2, 3, 4, 5"),
        (["--challenger", "newest"], "no version with the alias 'newest'; it has challenger (version 5), champion"),
        (["--sets", tmp_path / "five"], "5 images in all can't tell a better model from noise; at least 6"),
        (["--sets", f"{tiny_photos},{tmp_path / 'five'}"], "tiny_photos and five share 5 images"),
    ]:
        outcome = promote(model, *arguments)
        assert outcome.status == 2 and message in outcome.err, outcome.err
        assert outcome.out == ""
    assert model.champion == "1"
    selected = promote(model, "--dry-run")
    assert selected.status == 0
    assert f"warning: tiny_photos is the set by which its best checkpoint was chosen (models:/{model.name}/5)" in (
        selected.err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m"], "Give --sets (scored now) or --scores (files)"),
        (["m", "--sets", "a", "--scores", "a.json", "b.json"], "--scores are read, not made; leave out --sets"),
        (["m", "--rollback", "--sets", "a"], "--rollback compares nothing; leave out --sets"),
        (
            ["m", "--rollback", "--challenger", "3", "--metric", "ssim", "--tile-px-lr", "96", "--device", "cpu"],
            "--rollback compares nothing; leave out --challenger, --metric, --tile-px-lr, --device",
        ),
        (["m", "--scores", "a", "b", "--device", "cuda"], "--scores are read, not made; leave out --device"),
        (["m", "--sets", "a", "--metric", "lpips"], "unknown metric 'lpips'; there are: psnr  ssim (--metric)"),
        (["m", "--sets", "a", "--metric", "ssim", "--min-gain-db", "0.1"], "--min-gain-db is in dB"),
        (["m", "--sets", "a", "--min-gain-db", "-1"], "min_gain_db=-1 must be at least 0"),
        (["m", "--sets", "a"], "mlflow.db has no registered model 'm' with a version (MLFLOW_TRACKING_URI"),
        (["models:/m", "--sets", "a"], "'models:/m' is no name of a registered model"),
    ],
)
def test_mistakes_are_named(run_main, tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = run_main(promote_model.main, *arguments, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err
    assert not (tmp_path / "mlflow.db").exists()


def test_a_registry_that_is_away_is_one_line_within_seconds(run_main) -> None:
    away = ("--sets", "a", "--tracking-uri", "http://127.0.0.1:9")
    started_s = time.monotonic()
    outcome = run_main(promote_model.main, "m", *away)
    assert time.monotonic() - started_s < 10
    assert outcome.status == 2 and "http://127.0.0.1:9: can't be reached" in outcome.err
    assert outcome.err.count("\n") == 1
