"""What a run will cost and what is likely wrong with it, before it is started: behind `latentdiff info CONFIG`.

The trainers' own parts and steps are run on random data, so that what is measured is what training does. Nothing is
written to disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from latentdiff.config import AutoencoderConfig, Config, DiffusionConfig


def plan(config: Config, path: Path) -> dict[str, Any]:
    """Facts of a stage-1 or stage-2 config that was read from `path`; none of another stage's.

    Each stage of the planning is a line on stderr. Has `warnings`, and under `unknown` what cannot be said yet, with the
    reason. UserError for a config that training would refuse, unless it is one of the things warned of.
    """
    if not isinstance(config, AutoencoderConfig | DiffusionConfig):
        return {}
    from latentdiff.training.estimate.facts import note_compile, warn_of_time
    from latentdiff.training.estimate.inputs import Notes
    from latentdiff.training.estimate.progress import Progress
    from latentdiff.training.estimate.stages import plan_autoencoder, plan_diffusion
    from latentdiff.training.notices import length_warnings

    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(), Progress() as progress:
            notes = Notes(say=progress)
            notes.warnings += length_warnings(config)
            note_compile(config.train, notes)
            if isinstance(config, AutoencoderConfig):
                facts = plan_autoencoder(config, notes)
            else:
                facts = plan_diffusion(config, path, notes)
            warn_of_time(config, facts, notes)
    finally:
        torch.set_num_threads(threads)
    return {**facts, "warnings": notes.warnings, "unknown": notes.unknown}
