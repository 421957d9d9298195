"""Video foundation model features, compressed with an eye for motion. The scripts beside this file use it."""

from .losses import FeatureErrors, motion_autoencoder_loss, token_relation_distillation, token_relations
from .model import (
    LatentDataset,
    MotionFeatureAutoencoder,
    MotionFeatureDecoder,
    MotionFeatureEncoder,
    UserError,
    describe_motion_embedding,
    load_feature,
)
