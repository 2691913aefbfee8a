"""Training of the feature network, which is also the classifier of the classification accuracy score."""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.config import FeaturesConfig
from latentdiff.data.datasets import ImageDataset
from latentdiff.errors import UserError
from latentdiff.evaluation.feature_training import train_features
from latentdiff.models.feature_net import FeatureNet
from latentdiff.training.accelerator import announcement, start_accelerator
from latentdiff.training.images import Images
from latentdiff.training.precision import OneProcess, Step, plain_steps, resolve
from latentdiff.training.run_folder import write_config


def train_feature_network(config: FeaturesConfig, resume: bool = False) -> Path:
    """Train the feature network that a config describes, write it to <output>/features and return that folder.

    UserError for a mistake in the config or the data, for a run that is there already, and for `resume`: it has no states.
    """
    unknown = set(config.model) - {"widths"}
    if unknown:
        raise UserError(f"model.{sorted(unknown)[0]}: unknown key; a feature network has only widths, three numbers")
    output = Path(config.output)
    if resume or (output / "features").exists():
        raise UserError(f"output {output}: a feature network trains in one go; leave --resume out and name a new folder")
    if config.data.copies > 1:
        raise UserError(
            f"data.copies: {config.data.copies}, but a feature network trains on the images themselves; set it to 1"
        )
    images = Images(config.data, multiple_of=1)
    accelerator = start_accelerator(config.train)
    if accelerator.num_processes > 1:
        raise UserError("stage: features trains in one process; start it without accelerate launch")
    config, precision = resolve(config, output, accelerator, partial(_trial_steps, config, images.train))
    announcement(accelerator, config.train, precision)()
    images.print_report()
    net = train_features(
        images.train,
        test=images.held_out,
        steps=config.train.steps,
        batch=config.train.batch_size,
        lr=config.lr,
        seed=config.seed,
        flips=images.flips,
        name=config.name,
        device=accelerator.device,
        precision=config.train.precision,
        workers=images.workers,
        **config.model,
    )
    write_config(output, config)
    net.save(output / "features")
    accuracy, count = net.info["test_accuracy"], len(images.held_out)
    print(f"{config.name}: accuracy {accuracy:.4f} on {count} held-out images", file=sys.stderr)
    return output / "features"


def _trial_steps(config: FeaturesConfig, dataset: ImageDataset, alone: OneProcess) -> Step:
    """Training steps of such a network on random images of the data's shape, to be timed."""
    images, _ = dataset.batch([0])
    classes = max(1, len(dataset.class_names))
    net = FeatureNet(images.shape[1], classes, **config.model, normed=True)

    def loss(module: nn.Module, batch: int) -> Tensor:
        x = torch.rand(batch, *images.shape[1:], device=alone.device) * 2 - 1
        return F.cross_entropy(module(x).float(), torch.randint(classes, (batch,), device=alone.device))

    return plain_steps(alone, net, loss)
