"""Video foundation model features, compressed with an eye for motion.

This folder is a package, whatever name it was cloned under, and its scripts also run by themselves. No form of import
between sibling modules works in both cases, so the modules exported here import no siblings.
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
