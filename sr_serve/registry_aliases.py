"""A registered model's champion in MLflow: reads what is there, moves the alias, keeps history in versions' tags."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sr_serve.promotion import PromotionError
from sr_serve.succession import (
    BEFORE_TAG,
    PROMOTED_AT_TAG,
    PROMOTION_TAG,
    ROLLED_BACK_AT_TAG,
    ModelState,
    Version,
    WayBack,
)
from sr_train.champion import CHAMPION
from sr_train.tracking_server import as_tracking_error, check_tracking, connect, redact, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient


def read_model(tracking_uri: str, name: str) -> ModelState:
    """A registered model's aliases and usable versions. PromotionError if there is none of that name.

    TrackingError, within seconds, if the registry can't be reached.
    """
    if not name or set(name) & set("'\"/:%"):
        raise PromotionError(f"{name!r} is no name of a registered model: give it without models:/, as in edsr-x4")
    nothing = PromotionError(
        f"{redact(tracking_uri)} has no registered model {name!r} with a version (MLFLOW_TRACKING_URI, --tracking-uri)"
    )
    if tracking_uri.startswith("sqlite:") and not sqlite_path(tracking_uri).exists():
        raise nothing  # MLflow would make a database there
    check_tracking(tracking_uri)  # MLflow itself would try an unreachable server for minutes
    with as_tracking_error(tracking_uri):
        client = connect(tracking_uri)
        versions: dict[str, Version] = {}
        token: str | None = None
        while True:
            page = client.search_model_versions(f"name = '{name}'", page_token=token)
            for it in page:
                if it.status == "READY":
                    number = str(it.version)
                    versions[number] = Version(name=name, version=number, tags=dict(it.tags))
            token = page.token
            if not token:
                break
        if not versions:
            raise nothing
        aliases = {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    return ModelState(name=name, aliases=aliases, versions=versions)


def promote(tracking_uri: str, compared: ModelState, challenger: Version, *, by_number: bool, record: str) -> None:
    """Makes `challenger` the champion in place of the one in `compared`; `record` becomes its tag `promotion`.

    Scoring may have taken hours, so the registry is read again. PromotionError, with nothing changed, if the champion
    is another one by now, or the challenger may not be promoted any more (`by_number`: see `ModelState.promotable`).
    TrackingError if the registry refuses or goes away.
    """
    state = read_model(tracking_uri, compared.name)
    challenger = state.promotable(challenger.version, by_number=by_number)
    tags = {
        BEFORE_TAG: state.before_tag(challenger),
        PROMOTED_AT_TAG: _now(),
        PROMOTION_TAG: record,
        ROLLED_BACK_AT_TAG: None,
    }
    expected = None if compared.champion is None else compared.champion.version
    with as_tracking_error(tracking_uri):
        # The tags first: a process killed in between leaves tags that say too much, not a champion without history.
        _tag_and_move(connect(tracking_uri), challenger, tags, expected=expected, to=challenger.version)


def roll_back(tracking_uri: str, way: WayBack) -> None:
    """Makes `way.to` the champion again, and takes `way.left` out of the history. Errors as `promote`."""
    left = way.left[0]
    with as_tracking_error(tracking_uri):
        client = connect(tracking_uri)
        # The mark first: a process killed in between must not leave a version that lost its place without it, or the
        # alias `challenger`, if it is still there, gets it promoted once more.
        _tag_and_move(client, left, {ROLLED_BACK_AT_TAG: _now()}, expected=left.version, to=way.to.version)
        for version, before in way.tags_left():
            _set_tags(client, version, {BEFORE_TAG: before})
        _set_tags(client, way.to, {ROLLED_BACK_AT_TAG: None})


def _tag_and_move(
    client: "MlflowClient", tagged: Version, tags: Mapping[str, str | None], *, expected: str | None, to: str
) -> None:
    """Sets tags of a version, then the alias from version `expected` to `to`; the tags as they were if it is elsewhere.

    MLflow has no compare-and-set: a move by someone else in the milliseconds between look and move is overwritten.
    """
    _check_still(client, tagged.name, expected)
    _set_tags(client, tagged, tags)
    try:
        _check_still(client, tagged.name, expected)
    except PromotionError:
        _set_tags(client, tagged, {key: tagged.tags.get(key) for key in tags})
        raise
    client.set_registered_model_alias(tagged.name, CHAMPION, to)
    _check_still(client, tagged.name, to, moved=True)


def _check_still(client: "MlflowClient", name: str, expected: str | None, *, moved: bool = False) -> None:
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    found = None if version is None else str(version)
    if found == expected:
        return
    is_now = "is at no version" if found is None else f"is at version {found}"
    was = "no version" if expected is None else f"version {expected}"
    raise PromotionError(
        f"{name}@{CHAMPION} {is_now} now, not at {was}: someone else moved it meanwhile. "
        + ("It was moved by this command, and then by another." if moved else "Nothing was moved; run this again.")
    )


def _set_tags(client: "MlflowClient", version: Version, tags: Mapping[str, str | None]) -> None:
    """None takes a tag away."""
    there = client.get_model_version(version.name, version.version).tags
    for key, value in tags.items():
        if value is not None:
            client.set_model_version_tag(version.name, version.version, key, value)
        elif key in there:
            client.delete_model_version_tag(version.name, version.version, key)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
