"""Copies, verifies and tiles a dataset to a target URI and makes its LR folders; what was done is never done again."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal

from sr_data.catalogue import (
    Catalogue,
    Layout,
    catalogue,
    is_lr,
    list_images,
    lr_key,
    splits_of,
)
from sr_data.errors import DataError
from sr_data.file_facts import FileFacts, table_to_json
from sr_data.manifest import STAGED_KEY
from sr_data.staging_image import StagedImage, StagingJob, stage_image
from sr_data.staging_journal import Finished, Journal
from sr_data.storage import FileEntry, Store, open_store
from sr_data.tiling import Tiling

_NAMED_IN_ERRORS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StagingOptions:
    """What to stage, and how."""

    source: str
    target: str
    layout: Layout = "auto"
    split: str = "all"
    make_lr: tuple[int, ...] = ()
    """Scales to make LR images for, where the source ships none."""
    tiling: Tiling | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    num_workers: int = 8
    """Files under way at once, each in a thread: Pillow, zlib, numpy and the network release the GIL, and one machine
    fills the link to its object storage. Ray would add a cluster's start-up and nothing else."""

    def __post_init__(self) -> None:
        """Refuses what could not work, before anything is read."""
        if wrong := [scale for scale in self.make_lr if not 2 <= scale <= 16]:
            raise DataError(f"--make-lr {wrong[0]}: a scale is from 2 to 16, usually 2, 3 or 4")
        if self.num_workers < 1:
            raise DataError(f"--num-workers {self.num_workers}: at least 1")
        if open_store(self.source) == open_store(self.target):
            raise DataError(f"--source and --target are both {self.target}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StagingReport:
    """What a run has done."""

    layout: str
    num_images: Mapping[str, int]
    """Split → HR images in the source."""
    num_files: int
    """Image files in the target, tiles and LR included."""
    num_bytes: int
    num_done_before: int
    """HR images that an earlier run had finished."""
    bytes_read: int
    bytes_sent: int
    lr_made: int
    conversions: Mapping[str, int]
    """Files whose pixels are converted to 8-bit RGB on reading (by tiling: have been), by kind."""
    left_out: tuple[str, ...]
    elapsed_s: float


def stage_dataset(options: StagingOptions, *, progress: Callable[[int, int, int], None] | None = None) -> StagingReport:
    """Stages a dataset; `progress` is called with (images done, images in all, bytes sent).

    Files are copied byte for byte in the source's layout; with tiling, PNG sub-images take their place. Every image is
    decoded on the way. `manifest.json` is written last: where it is, everything is there. A run that was killed is gone
    on with by the same command.

    Raises:
        DataError: nothing to stage, unpaired or unusable images, a target that holds something else.
        StorageError: source or target refuses; what was sent stays, and counts when the command is given again.
    """
    started = time.monotonic()
    source, target = open_store(options.source), open_store(options.target)
    entries = {entry.key: entry for entry in source.list()}
    splits = [options.split] if options.split != "all" else list(splits_of(entries, options.layout)) or [""]
    parts = [catalogue(entries, uri=source.uri, split=split, layout=options.layout) for split in splits]
    jobs = [job for part in parts for job in _jobs(options, source, part, entries)]
    target.check_writable()
    there = {entry.key: entry for entry in target.list()}
    journal = Journal(target)
    journal.forget_missing(there, keep={job.image.hr_key for job in jobs})
    _check_target(target, there, jobs, parts, journal, tiled=options.tiling is not None)
    todo = [job for job in jobs if not _is_finished(job, journal, there)]
    if todo:
        target.delete(STAGED_KEY)  # until it is written again, nobody takes the target for complete
    done = _run(todo, options, source, target, there, journal, len(jobs), progress)
    problems = [one.problem for one in done if one.problem]
    if problems and options.on_bad_image == "error":
        raise DataError(f"{source.uri}: {len(problems)} of {len(jobs)} images can't be used; repair or remove them, or "
                        f"leave them out with --on-bad-image skip.{_lines(problems)}")  # fmt: skip
    table = {key: facts for one in journal.finished.values() for key, facts in one.outputs.items()}
    _finish(target, table, journal)
    notes = Counter(note for one in done for note in one.notes) if options.tiling else Counter(
        note for facts in table.values() for note in facts.notes)  # fmt: skip
    return StagingReport(
        layout=parts[0].layout,
        num_images={part.split or "all": len(part.images) for part in parts},
        num_files=len(table),
        num_bytes=sum(facts.num_bytes for facts in table.values()),
        num_done_before=len(jobs) - len(todo),
        bytes_read=sum(one.bytes_read for one in done),
        bytes_sent=sum(one.bytes_sent for one in done),
        lr_made=sum(one.lr_made for one in done),
        conversions=dict(sorted(notes.items())),
        left_out=tuple(problems),
        elapsed_s=time.monotonic() - started,
    )


def _jobs(
    options: StagingOptions, source: Store, part: Catalogue, entries: Mapping[str, FileEntry]
) -> list[StagingJob]:
    for scale in part.lr_scales:
        part.check_pairs(source.uri, scale)
    scales = tuple(sorted({*part.lr_scales, *options.make_lr}))
    if options.tiling is not None:
        options.tiling.check(scales or (1,))
    how = [scales, options.tiling and [options.tiling.tile_px, options.tiling.step_px]]
    jobs = []
    for image in part.images:
        files = [entries[key] for key in (image.hr_key, *image.lr_keys.values())]
        what = [[entry.key, entry.num_bytes, entry.version] for entry in files]
        signature = hashlib.sha256(json.dumps([source.uri, how, what]).encode()).hexdigest()[:32]
        jobs.append(StagingJob(image=image, folders=part.folders, scales=scales, signature=signature))
    return jobs


def _is_finished(job: StagingJob, journal: Journal, there: Mapping[str, FileEntry]) -> bool:
    before = journal.finished.get(job.image.hr_key)
    return before is not None and before.signature == job.signature and all(
        key in there and there[key].num_bytes == facts.num_bytes for key, facts in before.outputs.items()
    )  # fmt: skip


def _check_target(
    target: Store,
    there: Mapping[str, FileEntry],
    jobs: list[StagingJob],
    parts: list[Catalogue],
    journal: Journal,
    *,
    tiled: bool,
) -> None:
    """DataError if the target would hold images that are not of this dataset: they would be trained on."""
    planned: set[str] = set()
    for job in jobs:
        stem = job.folders.hr + job.image.name
        keys = [job.image.hr_key, *job.image.lr_keys.values()]
        keys += [lr_key(job.folders, job.image.name, scale) for scale in job.scales]
        planned.update({stem} if tiled else keys)
    staged = {key: hr_key for hr_key, one in journal.finished.items() for key in one.outputs}
    hr_folders = tuple(part.folders.hr for part in parts)

    def belongs(key: str) -> bool:
        if key in planned or (tiled and key.rpartition("_s")[0] in planned):
            return True
        if tiled and is_lr(key):
            return True
        return key in staged and (is_lr(key) or not staged[key].startswith(hr_folders))

    if strangers := [key for key in list_images(there) if not belongs(key)]:
        raise DataError(f"{target.uri}: holds {len(strangers)} images that this command does not put there (of another "
                        "dataset, cut into other tiles, or removed from the source); delete them or choose another "
                        f"--target.{_lines(strangers)}")  # fmt: skip


def _run(
    todo: list[StagingJob],
    options: StagingOptions,
    source: Store,
    target: Store,
    there: Mapping[str, FileEntry],
    journal: Journal,
    num_jobs: int,
    progress: Callable[[int, int, int], None] | None,
) -> list[StagedImage]:
    done: list[StagedImage] = []
    sent = 0
    with ThreadPoolExecutor(options.num_workers, "stage") as threads:
        futures = {threads.submit(stage_image, job, options.tiling, source, target, there): job for job in todo}
        try:
            for future in as_completed(futures):
                one, job = future.result(), futures[future]
                done.append(one)
                sent += one.bytes_sent
                if one.problem is None:
                    _note(job, one, journal, target)
                if progress is not None:
                    progress(num_jobs - len(todo) + len(done), num_jobs, sent)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
        finally:
            journal.flush()
    return done


def _note(job: StagingJob, one: StagedImage, journal: Journal, target: Store) -> None:
    """Journals an image. LR that an earlier run made for other scales stays as long as HR is the same."""
    before = journal.finished.get(job.image.hr_key)
    kept: dict[str, FileFacts] = {}
    for key, facts in before.outputs.items() if before else ():
        if key in one.outputs:
            continue
        if is_lr(key) and before and before.outputs.get(job.image.hr_key) == one.outputs.get(job.image.hr_key):
            kept[key] = facts
        else:
            target.delete(key)
    journal.add(job.image.hr_key, Finished(signature=job.signature, outputs={**kept, **one.outputs}))


def _finish(target: Store, table: Mapping[str, FileFacts], journal: Journal) -> None:
    """Compares the target with the table once more, and only then calls it complete."""
    there = {entry.key: entry.num_bytes for entry in target.list()}
    wrong = [key for key, facts in table.items() if there.get(key) != facts.num_bytes]
    if wrong:
        raise DataError(f"{target.uri}: {len(wrong)} files are not as they were sent; is another program writing "
                        f"there? Run prepare_dataset again.{_lines(wrong)}")  # fmt: skip
    if not table:
        raise DataError(f"{target.uri}: nothing was staged, no image of the source can be used")
    journal.compact()
    text = table_to_json(table)
    if STAGED_KEY not in there or target.read_text(STAGED_KEY) != text:
        target.write(STAGED_KEY, text.encode())


def _lines(problems: list[str]) -> str:
    more = f"\n  and {len(problems) - _NAMED_IN_ERRORS} more" if len(problems) > _NAMED_IN_ERRORS else ""
    return "".join(f"\n  {problem}" for problem in problems[:_NAMED_IN_ERRORS]) + more
