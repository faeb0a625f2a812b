"""Make a registered model's challenger its champion, if it is better than noise can explain; or go back.

    python pipelines/promote_model.py edsr-x4 --sets data/Set5,data/B100
    python pipelines/promote_model.py edsr-x4 --scores challenger.json champion.json --dry-run
    python pipelines/promote_model.py edsr-x4 --rollback

Both are scored on the same images; the challenger becomes champion if the 95 % confidence interval of the mean
difference lies above 0 (--min-gain-db) and no set is worse. docs/promotion.md tells more.

Exit status: 0 promoted or rolled back (or would be, with --dry-run), 1 not better, 2 something to mend.
"""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import tyro

from sr_data.errors import DataError, StorageError
from sr_models.errors import ModelError
from sr_serve.evaluation import evaluate, open_models, open_sets
from sr_serve.promotion import Decision, PairedSet, PromotionError, check_enough, check_no_image_twice, decide
from sr_serve.registry_aliases import promote, read_model, roll_back
from sr_serve.score_files import paired_sets
from sr_serve.succession import Version, check_not_trained_on, doubts
from sr_train.cli import exit_with
from sr_train.metrics import PAPERS_PROTOCOL, MetricError
from sr_train.model_registry import CHALLENGER
from sr_train.paired import metric_named
from sr_train.tracking_server import TrackingError, resolve_tracking_uri
from sr_train.upscaler import BICUBIC, UpscalerError

USER_ERRORS = (DataError, StorageError, ModelError, MetricError, UpscalerError, TrackingError, PromotionError)
DONE, NOT_BETTER = 0, 1
OF_ROLLBACK = ("name", "rollback", "dry_run", "tracking_uri")
"""Options that mean something with --rollback."""
OF_SCORES = ("name", "scores", "challenger", "metric", "min_gain_db", "dry_run", "tracking_uri")
"""Options that mean something with --scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line."""

    name: tyro.conf.Positional[str]
    """The registered model, as in edsr-x4."""
    sets: str | None = None
    """Folders or URIs of the sets to score both on, separated by commas."""
    split: str | None = None
    """Which part of a dataset that has several: test (when not given), valid or train."""
    protocol: str | None = None
    """psnr@y,crop=scale (the papers', when not given), psnr@rgb,crop=scale or psnr@rgb,crop=scale+6 (EDSR on DIV2K)."""
    scores: tuple[str, str] | None = None
    """In place of --sets: files of evaluate_model.py --json with the challenger's and the champion's scores."""
    challenger: str = CHALLENGER
    """Which version to promote: an alias, or a version's number."""
    metric: str = "psnr"
    """What is compared image by image: psnr or ssim."""
    min_gain_db: float = 0.0
    """How many dB the whole confidence interval must lie above."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Do and say all but the last: nothing is moved, no tag is written."""
    rollback: tyro.conf.FlagCreatePairsOff[bool] = False
    """Give the champion's place back to the version that had it before."""
    tile_px_lr: int = 192
    """Largest tile, in LR pixels: bounds the memory, does not change the result."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    tracking_uri: str | None = None
    """Where the registry is; MLFLOW_TRACKING_URI when not given."""


def main(arguments: Sequence[str]) -> None:
    """Parses, compares, moves the alias, says so. Exits with 1 if it was not moved, 2 on what the user can mend."""
    options = tyro.cli(Options, args=list(arguments), prog="promote_model.py", description=__doc__)
    try:
        _check_options(options)
        status = _roll_back(options) if options.rollback else _promote(options)
    except USER_ERRORS as error:
        exit_with(error)
    if status != DONE:
        sys.exit(status)


def _check_options(options: Options) -> None:
    """What is wrong whatever the registry holds."""
    metric = metric_named(options.metric)
    if metric == "ssim" and options.min_gain_db != 0.0:
        raise PromotionError("--min-gain-db is in dB, which SSIM has not; leave it out with --metric ssim")
    if not 0.0 <= options.min_gain_db < float("inf"):
        raise PromotionError(f"min_gain_db={options.min_gain_db:g} must be at least 0 (--min-gain-db)")
    if options.rollback and (given := _given(options, but=OF_ROLLBACK)):
        raise PromotionError(f"--rollback compares nothing; leave out {', '.join(given)}")
    if options.scores is not None and (given := _given(options, but=OF_SCORES)):
        raise PromotionError(f"--scores are read, not made; leave out {', '.join(given)}")
    if not options.rollback and options.scores is None and options.sets is None:
        raise PromotionError("on what are the two to be compared? Give --sets (scored now) or --scores (files)")


def _given(options: Options, *, but: Collection[str]) -> list[str]:
    """The flags that were given another value than they have by themselves."""
    return [
        f"--{field.name.replace('_', '-')}"
        for field in fields(options)
        if field.name not in but and getattr(options, field.name) != field.default
    ]


def _promote(options: Options) -> int:
    uri = resolve_tracking_uri(options.tracking_uri)
    state = read_model(uri, options.name)
    champion, challenger = state.champion, state.challenger(options.challenger)
    if champion is not None and challenger.version == champion.version:
        print(f"Nothing to do: {challenger.uri} is the champion.")
        return NOT_BETTER
    if champion is None:
        print(f"{state.name} has no champion yet: version {challenger.version} is compared with bicubic.")
    if options.scores is not None:
        paired = paired_sets(options.scores, challenger, champion)
        _check_sets(challenger, champion, {it.challenger.set: it.fingerprint for it in paired})
    else:
        paired = _scored(options, challenger, champion)
    against = BICUBIC if champion is None else f"version {champion.version}"
    decision = decide(paired, metric=metric_named(options.metric), min_gain=options.min_gain_db, champion=against)
    print(_report(decision, challenger, champion))
    of_model = f"version {challenger.version} {decision.reason}"
    if not decision.promote:
        stays = "no version is champion" if champion is None else f"version {champion.version} stays champion"
        print(f"Not promoted: {of_model}; {stays}.")
        return NOT_BETTER
    if options.dry_run:
        print(f"Would be promoted, but nothing was moved (--dry-run): {of_model}.")
        return DONE
    before = BICUBIC if champion is None else champion.version
    record = json.dumps(decision.to_json_dict(against=before), ensure_ascii=False)
    promote(uri, state, challenger, by_number=options.challenger.isdecimal(), record=record)
    print(f"Promoted: {of_model}; {state.name}@champion is version {challenger.version} now.")
    return DONE


def _scored(options: Options, challenger: Version, champion: Version | None) -> list[PairedSet]:
    """Scores both now; what can be wrong is found before the first score."""
    protocol = options.protocol or PAPERS_PROTOCOL
    models = open_models(
        [version.uri for version in (challenger, champion) if version is not None],
        device=options.device,
        tracking_uri=options.tracking_uri,
        tile_px_lr=options.tile_px_lr,
    )
    if len(models) > 1:
        scales = {opened.upscaler.name: scale for scale, of_scale in models.items() for opened in of_scale[1:]}
        named = " and ".join(f"{name} is an x{scale} model" for name, scale in scales.items())
        raise PromotionError(f"{named}: different scales can't be compared")
    sets = open_sets(options.sets or "", split=options.split or "test", scales=list(models), protocol=protocol)
    check_enough([(one.name, len(one.manifest.images)) for one in sets])
    check_no_image_twice({one.name: [image.hr_sha256 for image in one.manifest.images] for one in sets})
    _check_sets(challenger, champion, {one.name: one.manifest.fingerprint for one in sets})
    return [
        PairedSet(
            fingerprint=it.fingerprint,
            challenger=it.models[1].score,
            champion=it.bicubic if champion is None else it.models[2].score,
        )
        for it in evaluate(models, sets, protocol=protocol)
    ]


def _check_sets(challenger: Version, champion: Version | None, fingerprints: Mapping[str, str]) -> None:
    check_not_trained_on(challenger, fingerprints)
    for doubt in doubts(challenger, champion, fingerprints):
        print(f"warning: {doubt}", file=sys.stderr, flush=True)


def _report(decision: Decision, challenger: Version, champion: Version | None) -> str:
    columns = {
        "challenger": f"version {challenger.version}",
        "champion": BICUBIC if champion is None else f"version {champion.version}",
    }
    kind = "PSNR in dB" if decision.metric == "psnr" else "SSIM of Y"
    return f"{challenger.name}  x{decision.scale}  {decision.protocol}  {kind}\n{decision.table(**columns)}"


def _roll_back(options: Options) -> int:
    uri = resolve_tracking_uri(options.tracking_uri)
    state = read_model(uri, options.name)
    way = state.way_back()
    for skipped in way.left[1:]:
        print(f"{skipped.uri} was champion before, and is left out: it must not become champion any more.")
    step = f"{state.name}@champion from version {way.left[0].version} back to version {way.to.version}"
    if options.dry_run:
        print(f"Would move {step}; nothing was moved (--dry-run).")
        return DONE
    roll_back(uri, way)
    print(f"Moved {step}.")
    return DONE


if __name__ == "__main__":
    main(sys.argv[1:])
