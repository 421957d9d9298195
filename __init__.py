"""Video foundation model features, compressed with an eye for motion.

The folder is a package under whatever name it was cloned, and its scripts run by themselves. No way to import a sibling
works in both, so the modules that are exported here import none.
"""

from .losses import FeatureErrors, motion_autoencoder_loss, token_relation_distillation, token_relations
from .model import (
    LatentDataset,
    MotionFeatureAutoencoder,
    MotionFeatureDecoder,
    MotionFeatureEncoder,
    UserError,
    describe_motion_embedding,
    load_feature,
    resample_latent,
)
