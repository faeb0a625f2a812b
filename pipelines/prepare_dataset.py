"""Copy, verify and (if asked) tile a dataset to where a cluster trains from it, and make its LR images.

python pipelines/prepare_dataset.py --source ~/DIV2K --target s3://bucket/div2k
python pipelines/prepare_dataset.py --source ~/BSDS500 --target s3://bucket/bsd500 --make-lr 2,3,4
python pipelines/prepare_dataset.py --source ~/DIV2K --target s3://bucket/div2k-480 --tile-px 480 --tile-step-px 240

Give the same command again after an interruption: what was finished is not read or sent again.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from sr_data.catalogue import Layout
from sr_data.errors import DataError, StorageError
from sr_data.staging import StagingOptions, StagingReport, stage_dataset
from sr_data.tiling import Tiling

LINE_INTERVAL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the flags are."""

    source: str
    """URI of the dataset: s3://bucket/prefix, a path, file:///folder or builtin://photos."""
    target: str
    """URI to stage it to: s3://bucket/prefix or a path; empty, or holding an earlier run's part."""
    layout: Layout = "auto"
    """How the source names its folders; "auto" tells by their names."""
    split: str = "all"
    """train, valid, test, or all that there are."""
    make_lr: str = ""
    """Scales to make LR for where the source ships none, for example 2,3,4: MATLAB's bicubic, bit for bit."""
    tile_px: int = 0
    """Cut HR into squares of this side (PNG; LR accordingly) instead of copying files; 0: copy."""
    tile_step_px: int = 0
    """Distance of the squares; 0: the same as --tile-px, without overlap."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An unusable image: list them all and exit with 2, or leave them out and count them."""
    num_workers: int = 8
    """Files under way at once."""


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._started = self._said = time.monotonic()
        self._bar = tqdm(unit="img", disable=not sys.stderr.isatty())

    def __call__(self, done: int, total: int, bytes_sent: int) -> None:
        """Shows the state; cheap enough to be called for every image."""
        now = time.monotonic()
        rate = f"{bytes_sent / 1e6 / max(now - self._started, 1e-9):.1f} MB/s"
        if not self._bar.disable:
            self._bar.total, self._bar.n = total, done
            self._bar.set_postfix_str(rate, refresh=False)
            self._bar.update(0)
            self._bar.refresh()
        elif now - self._said >= LINE_INTERVAL_S or done == total:
            self._said = now
            print(f"staged {done}/{total} images, {bytes_sent / 1e6:.1f} MB sent, {rate}", flush=True)

    def close(self) -> None:
        """Leaves the terminal to what comes after."""
        self._bar.close()


def options_from(arguments: Arguments) -> StagingOptions:
    """The library's options; DataError names the flag that makes no sense."""
    try:
        make_lr = tuple(sorted({int(scale) for scale in arguments.make_lr.split(",") if scale.strip()}))
    except ValueError as error:
        raise DataError(f"--make-lr {arguments.make_lr!r}: scales with commas between are expected: 2,3,4") from error
    if arguments.tile_step_px and not arguments.tile_px:
        raise DataError("--tile-step-px needs --tile-px")
    tiling = None
    if arguments.tile_px:
        tiling = Tiling(tile_px=arguments.tile_px, step_px=arguments.tile_step_px or arguments.tile_px)
    return StagingOptions(
        source=arguments.source,
        target=arguments.target,
        layout=arguments.layout,
        split=arguments.split,
        make_lr=make_lr,
        tiling=tiling,
        on_bad_image=arguments.on_bad_image,
        num_workers=arguments.num_workers,
    )


def summary(report: StagingReport, target: str) -> str:
    """What was done, for whoever reads the log."""
    splits = ", ".join(f"{number} {split}" for split, number in report.num_images.items())
    before = f" ({report.num_done_before} of them finished before)" if report.num_done_before else ""
    seconds = max(report.elapsed_s, 1e-9)
    lines = [
        f"{target}: complete",
        f"  layout       {report.layout}",
        f"  HR images    {splits}{before}",
        f"  files        {report.num_files}, {report.num_bytes / 1e6:.1f} MB; LR images made now: {report.lr_made}",
        f"  transfer     {report.bytes_read / 1e6:.1f} MB read, {report.bytes_sent / 1e6:.1f} MB sent in "
        f"{report.elapsed_s:.1f} s ({(report.bytes_read + report.bytes_sent) / 1e6 / seconds:.1f} MB/s)",
    ]
    lines += [f"  converted    {kind}: {number} files" for kind, number in report.conversions.items()]
    lines += [f"  left out     {problem}" for problem in report.left_out]
    return "\n".join(lines)


def main(command_line: Sequence[str]) -> int:
    """Exit status 0, or 2 with a message on what the user can mend."""
    import tyro  # here, so that tests of the functions above need not wait for it

    arguments = tyro.cli(Arguments, args=command_line, prog="prepare_dataset.py", description=__doc__)
    progress = Progress()
    try:
        report = stage_dataset(options_from(arguments), progress=progress)
    except (DataError, StorageError) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        progress.close()
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    progress.close()
    print(summary(report, arguments.target))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
