"""Training of both stages, and of the smaller networks: `train` starts the trainer that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError
from latentdiff.utils import locks, processes, signals

if TYPE_CHECKING:
    from latentdiff.config import Config


def train(config: Config | str | Path, resume: bool = False, overrides: Sequence[str] = ()) -> Path:
    """Train one stage as a config says: an autoencoder, a diffusion model, a feature network, a classifier or a judge.

    A signal saves the state and ends the run (see `latentdiff.utils.signals`). Torch's number of threads and its global
    random numbers are afterwards as before.

    Args:
        config: a YAML file, such as configs/fashion-mnist/diffusion.yaml. In Python also a loaded config.
        resume: go on from the newest training state in the output folder.
        overrides: values that replace the file's, as key=value, such as train.steps=100.

    Returns:
        The folder of what was made: a checkpoint, or a network.

    Raises:
        UserError: a mistake in the config, or data, weights or a state that it names and that cannot be used.
        Interrupted: a KeyboardInterrupt, after Ctrl-C.
        Stopped: a SystemExit, after another signal.
    """
    # Imports stand where they are used: the command line reads this signature without waiting for torch
    from latentdiff.training import run_clock

    began = run_clock.now()  # train.minutes counts the imports too
    from latentdiff.checkpoints import resolve_config
    from latentdiff.config import AutoencoderConfig, ClassifierConfig, DiffusionConfig, DiscreteConfig, JudgeConfig, load_config
    from latentdiff.training.accelerator import torch_settings_restored
    from latentdiff.training.run_folder import how_to_continue
    from latentdiff.utils import atomic

    if isinstance(config, str | Path):
        config = load_config(resolve_config(config), list(overrides))
    elif overrides:
        raise UserError("overrides: belong to a config file, and this config is loaded; give them to load_config")
    with torch_settings_restored(), signals.watched(lambda: how_to_continue(config)):
        # The two stages: on one process or several, with training states to resume from
        if isinstance(config, AutoencoderConfig):
            from latentdiff.training.train_autoencoder import train_autoencoder

            return train_autoencoder(config, resume, began)
        if isinstance(config, DiffusionConfig):
            from latentdiff.training.train_diffusion import train_diffusion

            return train_diffusion(config, resume, began)
        if isinstance(config, DiscreteConfig):
            from latentdiff.training.train_discrete import train_discrete

            return train_discrete(config, resume, began)

        # Smaller networks: in one go, on one process. A judge's folder is replaced as a whole, so its lock lies beside it
        if processes.count() > 1:
            raise UserError(f"stage: {config.stage} trains in one process; start it without accelerate launch")
        with locks.locked(config.output, beside=isinstance(config, JudgeConfig)):
            if isinstance(config, JudgeConfig):
                from latentdiff.training.train_judge import train_judge

                return train_judge(config, resume)
            atomic.sweep(Path(config.output))
            if isinstance(config, ClassifierConfig):
                from latentdiff.training.train_classifier import train_latent_classifier

                return train_latent_classifier(config, resume)
            from latentdiff.training.train_feature_net import train_feature_network

            return train_feature_network(config, resume)
