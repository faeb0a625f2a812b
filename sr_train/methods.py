"""The methods by the type of their config."""

from typing import Any

from sr_train.adversarial import ADVERSARIAL
from sr_train.adversarial_config import AdversarialConfig
from sr_train.config import TrainConfig
from sr_train.method import PIXEL, Method

METHODS: dict[type[TrainConfig[Any]], Method] = {TrainConfig: PIXEL, AdversarialConfig: ADVERSARIAL}


def method_of(config: TrainConfig[Any]) -> Method:
    """The method that a config is one of."""
    return METHODS[type(config)]
