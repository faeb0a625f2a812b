"""Search learning-rate schedules and sizes of EDSR with Ray Tune, and register the best model in MLflow.

python pipelines/tune_edsr.py                                      a dozen small networks on built-in photos
python pipelines/tune_edsr.py --preset edsr-baseline-x4 --data.uri s3://bucket/div2k --num-trials 32 --search tpe
python pipelines/tune_edsr.py --space.num-blocks 8,16,32 --space.schedule.kind step,cosine,one-cycle --scheduler none
"""

import sys
import time
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Parse, plan, search, register. Exits with 2 and a message on what the user can mend."""
    started_s = time.time()
    from sr_models.edsr import EDSRConfig
    from sr_train.cli import exit_with
    from sr_train.config import TrainConfig
    from sr_train.driver import Interrupted
    from sr_train.presets import EDSR_PRESETS, edsr_space
    from sr_train.sweep import SWEEP_ERRORS, run_tuning
    from sr_train.sweep_cli import parse_sweep
    from sr_train.training_space import EDSRSpace, TrainingSpace

    try:
        command = parse_sweep(
            arguments,
            config_type=TrainConfig[EDSRConfig],
            space_type=TrainingSpace[EDSRSpace],
            space_of=edsr_space,
            presets=EDSR_PRESETS,
            default_preset="edsr-small-x2",
            prog="tune_edsr.py",
            description="Search learning-rate schedules and sizes of EDSR with Ray Tune, and register the best model.",
        )
        run_tuning(command, script_started_s=started_s)
    except SWEEP_ERRORS as error:
        exit_with(error)
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_status)


if __name__ == "__main__":
    main(sys.argv[1:])
