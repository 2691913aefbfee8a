"""Trainers: one per stage, each a step function and a short loop."""

from __future__ import annotations

from pathlib import Path

from latentdiff.config import AutoencoderConfig, ClassifierConfig, Config, DiffusionConfig, FeaturesConfig, JudgeConfig
from latentdiff.errors import UserError
from latentdiff.utils import atomic, locks, processes, signals


def train(config: Config, resume: bool = False) -> Path:
    """Run the trainer that the config's stage names; returns the folder of what it made.

    A signal ends the run (`latentdiff.utils.signals`): by Interrupted (a KeyboardInterrupt) after Ctrl-C, else by Stopped (a
    SystemExit), with the state saved. Torch's count of threads and its global random numbers are afterwards as before.
    """
    from latentdiff.training.accelerator import torch_settings_restored
    from latentdiff.training.run_folder import how_to_continue

    with torch_settings_restored(), signals.watched(lambda: how_to_continue(config)):
        return _train(config, resume)


def _train(config: Config, resume: bool) -> Path:
    if isinstance(config, AutoencoderConfig):
        from latentdiff.training.train_autoencoder import train_autoencoder

        return train_autoencoder(config, resume)
    if isinstance(config, DiffusionConfig):
        from latentdiff.training.train_diffusion import train_diffusion

        return train_diffusion(config, resume)
    if processes.count() > 1:
        raise UserError(f"stage: {config.stage} trains in one process; start it without accelerate launch")
    # A judge's output is replaced as a whole, so that the lock lies beside it
    with locks.locked(config.output, beside=isinstance(config, JudgeConfig)):
        if not isinstance(config, JudgeConfig):
            atomic.sweep(Path(config.output))
        return _train_in_one_go(config, resume)


def _train_in_one_go(config: ClassifierConfig | JudgeConfig | FeaturesConfig, resume: bool) -> Path:
    if isinstance(config, ClassifierConfig):
        from latentdiff.training.train_classifier import train_latent_classifier

        return train_latent_classifier(config, resume)
    if isinstance(config, JudgeConfig):
        from latentdiff.training.train_judge import train_judge

        return train_judge(config, resume)
    from latentdiff.training.train_feature_net import train_feature_network

    return train_feature_network(config, resume)
