"""What upscaling a folder has to do: a listing of SOURCE and one of TARGET → the images that are still to be made.

TARGET keeps a record, `upscale_images.json`: what its images are made with, and the version of each source when it was
planned. It is written before the first image, and what no longer agrees with it is deleted before that; so an image in
TARGET whose source is on the record in its present version is finished, whenever a run was killed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from sr_data.catalogue import list_images
from sr_data.storage import FileEntry
from sr_models.image_file import FORMATS, target_name

RECORD_KEY = "upscale_images.json"
FAILED_KEY = "upscale_images_failed.json"
FORMAT_FLAGS: Mapping[str, str | None] = {"same": None, "png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
"""--format → what `upscale_file` calls it."""
_SHOWN = 3
_WITNESSES = 3


class UpscaleError(ValueError):
    """What was asked for can't be done; the message names the argument or flag, and what is allowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All that the images in TARGET depend on, but for rounding."""

    model_sha256: str
    """16 hex digits over architecture, config and weights."""
    scale: int
    """Upscaling factor."""
    self_ensemble: bool
    """Whether the eight flips and quarter turns are averaged."""
    precision: str
    """float32 or bfloat16."""
    format: str
    """A key of `FORMAT_FLAGS`."""
    source: str
    """SOURCE's URI."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What `upscale_images.json` says."""

    recipe: Recipe
    model: str
    """MODEL, an alias in it resolved: for whoever reads the file."""
    sources: Mapping[str, str]
    """Key of a source → its version when its image was planned."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """One image to make."""

    key: str
    """Below SOURCE."""
    target_key: str
    """Below TARGET."""
    num_bytes: int | None
    """Of the source, as it was listed; None: not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What there is to do, in this order: delete `outdated`, write `record`, make `todo`."""

    todo: tuple[Image, ...]
    """Sorted by key."""
    outdated: tuple[str, ...]
    """Keys in TARGET of what was made of a source that has changed since, or by another recipe."""
    record: Record
    witnesses: tuple[str, ...]
    """A few images below SOURCE, first such as were read before: they show whether a refusal is about one image."""
    num_finished: int
    """Images that are there already."""
    num_ignored: int
    """Files below SOURCE that are no images by their suffix, or hidden."""


def read_record(text: str, *, uri: str) -> Record:
    """The record in a file's text; UpscaleError names `uri` if it is none."""
    names = {field.name for field in fields(Recipe)}
    try:
        found = json.loads(text)
        recipe, model, sources = found["recipe"], found["model"], found["sources"]
        if set(recipe) != names or not isinstance(sources, dict):
            raise ValueError("other fields than expected")
    except (ValueError, KeyError, TypeError) as error:
        raise UpscaleError(
            f"{uri}: does not say what the images beside it were made with ({type(error).__name__}: {error}); choose "
            f"another TARGET, or make all of them anew with --overwrite"
        ) from error
    return Record(recipe=Recipe(**recipe), model=str(model), sources=sources)


def make_plan(
    sources: Sequence[FileEntry],
    targets: Iterable[FileEntry],
    *,
    recipe: Recipe,
    model: str,
    target_uri: str,
    recorded: Record | None,
    overwrite: bool = False,
) -> Plan:
    """Compares what is to be there with what is.

    `recorded` is TARGET's record, None if it has none. `overwrite` makes everything anew, whatever it was made with.

    UpscaleError: no images; two sources that would become one file; a TARGET made with something else, or holding
    files of these names that are not on its record.
    """
    versions = {entry.key: entry.version for entry in sources}
    sizes = {entry.key: entry.num_bytes for entry in sources}
    keys = list_images(versions)
    if not keys:
        raise UpscaleError(f"{recipe.source}: none of its {len(sources)} files has an image's suffix (SOURCE)")
    images = tuple(
        Image(key=key, target_key=target_name(key, FORMAT_FLAGS[recipe.format]), num_bytes=sizes[key]) for key in keys
    )
    _check_distinct(images, recipe)
    existing = {entry.key for entry in targets}
    known: Mapping[str, str] = recorded.sources if recorded is not None and recorded.recipe == recipe else {}
    if overwrite:
        formats = {recipe.format} | ({recorded.recipe.format} if recorded is not None else set())
        outdated = {target_name(key, FORMAT_FLAGS[name]) for key in keys for name in formats} & existing
        known = {}
    else:
        if recorded is not None:
            _check_same(recorded.recipe, recipe, target_uri)
        _check_ours(images, existing, known, target_uri)
        outdated = {it.target_key for it in images if it.target_key in existing and known[it.key] != versions[it.key]}
    finished = existing - outdated
    todo = tuple(image for image in images if image.target_key not in finished)
    return Plan(
        todo=todo,
        outdated=tuple(sorted(outdated)),
        record=Record(recipe=recipe, model=model, sources={**known, **{key: versions[key] for key in keys}}),
        witnesses=_witnesses([image.key for image in images if image.target_key in finished], keys),
        num_finished=len(images) - len(todo),
        num_ignored=len(sources) - len(keys),
    )


def check_apart(source: str, target: str) -> None:
    """UpscaleError if one of two folders' URIs, links in them resolved, is the other or lies in it."""
    if f"{source}/".startswith(f"{target}/") or f"{target}/".startswith(f"{source}/"):
        raise UpscaleError(
            f"{target}: TARGET must not be SOURCE ({source}), in it or around it: a second run would upscale what the "
            f"first has made, or sources would be overwritten"
        )


def target_format(target: str, format_flag: str) -> str:
    """What the file TARGET, which has a suffix, is written as: PNG, JPEG or WEBP. UpscaleError if its suffix or
    --format is against it.
    """
    asked = FORMAT_FLAGS[format_flag]
    for name in [asked] if asked else FORMATS:
        if target_name(target, name) == target:
            return name
    wanted = f"--format {format_flag}" if asked else "written here: .png, .jpg and .webp are"
    raise UpscaleError(f"{target}: its suffix is not {wanted} (TARGET)")


def _witnesses(finished: Sequence[str], keys: Sequence[str]) -> tuple[str, ...]:
    """Spread, since what is refused often lies together."""
    spread = (names[:: -(-len(names) // _WITNESSES)] for names in (finished, keys) if names)
    return tuple(dict.fromkeys(name for names in spread for name in names))


def _check_distinct(images: Iterable[Image], recipe: Recipe) -> None:
    by_target: dict[str, list[str]] = {}
    for image in images:
        by_target.setdefault(image.target_key, []).append(image.key)
    clashes = [f"{' and '.join(keys)} → {target}" for target, keys in by_target.items() if len(keys) > 1]
    if clashes:
        raise UpscaleError(
            f"{recipe.source}: {len(clashes)} times several images would become one file: {_some(clashes, '; ')}. "
            f"Rename them, or choose another --format"
        )


def _check_same(before: Recipe, now: Recipe, target_uri: str) -> None:
    then, asked = asdict(before), asdict(now)
    changed = [f"{name} {then[name]}, not {asked[name]}" for name in asked if then[name] != asked[name]]
    if changed:
        raise UpscaleError(
            f"{target_uri}: its images were made with {'; '.join(changed)} ({RECORD_KEY}). Choose another TARGET, or "
            f"make all of them anew with --overwrite"
        )


def _check_ours(images: Iterable[Image], existing: set[str], known: Mapping[str, str], target_uri: str) -> None:
    foreign = [image.target_key for image in images if image.target_key in existing and image.key not in known]
    if foreign:
        raise UpscaleError(
            f"{target_uri}: holds {len(foreign)} files that are in the way and that this script has no record of "
            f"making: {_some(foreign, ', ')}. Choose another TARGET, or replace them with --overwrite"
        )


def _some(names: Sequence[str], separator: str) -> str:
    more = f"{separator}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more
