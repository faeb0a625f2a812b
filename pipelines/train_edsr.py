"""Train EDSR on a Ray cluster and register the best checkpoint in MLflow.

python pipelines/train_edsr.py                                     a small EDSR on built-in photos, anywhere
python pipelines/train_edsr.py --preset edsr-baseline-x4 --data.uri s3://bucket/div2k --run.num-workers 8
"""

import sys
import time
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Parse, plan, train, register. Exits with 2 and a message on what the user can mend."""
    started_s = time.time()
    from sr_models.edsr import EDSRConfig
    from sr_train.cli import exit_with, parse_train
    from sr_train.config import TrainConfig
    from sr_train.driver import USER_ERRORS, Interrupted, run_training
    from sr_train.presets import EDSR_PRESETS

    try:
        command = parse_train(
            arguments,
            config_type=TrainConfig[EDSRConfig],
            presets=EDSR_PRESETS,
            default_preset="edsr-small-x2",
            prog="train_edsr.py",
            description="Train EDSR on a Ray cluster and register the best checkpoint in MLflow.",
        )
        run_training(command, script_started_s=started_s)
    except USER_ERRORS as error:
        exit_with(error)
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_status)


if __name__ == "__main__":
    main(sys.argv[1:])
