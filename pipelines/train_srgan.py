"""Train SRGAN on a Ray cluster: SRResNet on pixels, then the GAN from it; register both in MLflow.

python pipelines/train_srgan.py                                    a small SRGAN on built-in photos
python pipelines/train_srgan.py --preset srgan-x4 --data.uri s3://bucket/div2k --run.num-workers 8
python pipelines/train_srgan.py --preset srgan-x4 --data.uri s3://bucket/div2k --init models:/srresnet-x4@champion
"""

import sys
import time
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Parse, plan, train both phases, register. Exits with 2 and a message on what the user can mend."""
    started_s = time.time()
    from sr_models.srresnet import SRResNetConfig
    from sr_train.adversarial_config import AdversarialConfig
    from sr_train.cli import exit_with, parse_train
    from sr_train.driver import USER_ERRORS, Interrupted
    from sr_train.srgan_presets import SRGAN_PRESETS
    from sr_train.two_phases import run_phases

    try:
        command = parse_train(
            arguments,
            config_type=AdversarialConfig[SRResNetConfig],
            presets=SRGAN_PRESETS,
            default_preset="srgan-small-x4",
            prog="train_srgan.py",
            description=(
                "Train SRGAN on a Ray cluster: SRResNet on pixels, then the GAN from it; register both in MLflow.\n\n"
                "--init MODEL (a checkpoint, a saved model's folder or models:/NAME): the GAN alone, from its weights."
            ),
            aliases={"--init": "--checkpoint.init-from"},
        )
        run_phases(command, script_started_s=started_s)
    except USER_ERRORS as error:
        exit_with(error)
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_status)
    except KeyboardInterrupt:  # while the phases were planned: there is nothing to end or to go on with
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
