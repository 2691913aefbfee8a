"""Guidance: denoisers made of denoisers.  Samplers never know.

Each has .schedule and answers (x, t, **conditioning) with a Denoised, so they nest.  Classifier and Reconstruction know
the label or the observation of each of the B samples: they stand outside of ClassifierFree, which shows what it holds
more than B samples at a time.  All of them leave each sample to itself, take an interval of t outside of which they do
nothing, and cost nothing beyond the denoiser where they are off: at scale 1, at strength 0, outside of the interval.
"""

from latentdiff.guidance.autoguidance import Autoguidance
from latentdiff.guidance.classifier_free import ClassifierFree
from latentdiff.guidance.common import check_interval, check_same_path
from latentdiff.guidance.gradient import Classifier, Reconstruction
from latentdiff.guidance.latent_classifier import LatentClassifier, load_classifier

__all__ = [
    "Autoguidance",
    "Classifier",
    "ClassifierFree",
    "LatentClassifier",
    "Reconstruction",
    "check_interval",
    "check_same_path",
    "load_classifier",
]
