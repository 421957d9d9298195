"""Video foundation model features, compressed with an eye for motion. The scripts beside this file use it."""

from .losses import motion_autoencoder_loss
from .model import (
    MotionFeatureAutoencoder,
    MotionFeatureDecoder,
    MotionFeatureEncoder,
    UserError,
    load_feature,
)

__all__ = [
    "MotionFeatureAutoencoder",
    "MotionFeatureDecoder",
    "MotionFeatureEncoder",
    "UserError",
    "load_feature",
    "motion_autoencoder_loss",
]
