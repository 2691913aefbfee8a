"""Guidance: denoisers made of denoisers. A sampler takes any of them in the place of a `Denoiser`.

Each has a .schedule and maps (x, t, **conditioning) to `Denoised`, so they nest. `Classifier` and `Reconstruction` hold the
label or observation of each of the B samples. So they must be around `ClassifierFree`, not in it: it calls what it holds with
more than B samples at a time. Every guidance treats each sample alone, has an interval of t outside of which it does nothing,
and costs no evaluation where it is off: at scale 1, at strength 0, or outside of the interval.
"""

from latentdiff.guidance.autoguidance import Autoguidance
from latentdiff.guidance.classifier_free import ClassifierFree
from latentdiff.guidance.common import check_interval, check_same_path
from latentdiff.guidance.gradient import RECONSTRUCTION_METHODS, Classifier, Reconstruction
from latentdiff.guidance.known_pixels import KnownPixels
from latentdiff.guidance.latent_classifier import LatentClassifier, load_classifier
from latentdiff.guidance.operators import Blur, Downsample, Grey, Mask, of_latents
from latentdiff.guidance.rules import RULES, Rule
from latentdiff.guidance.tasks import TASKS, Restoration, restoration

__all__ = [
    "RECONSTRUCTION_METHODS",
    "TASKS",
    "Autoguidance",
    "Blur",
    "Classifier",
    "ClassifierFree",
    "Downsample",
    "Grey",
    "KnownPixels",
    "LatentClassifier",
    "Mask",
    "Reconstruction",
    "RULES",
    "Restoration",
    "Rule",
    "check_interval",
    "check_same_path",
    "load_classifier",
    "of_latents",
    "restoration",
]
