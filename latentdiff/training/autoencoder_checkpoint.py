"""Stage 1's network as an autoencoder: pictures of its reconstructions while it trains, and the folder that is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff.config import AutoencoderConfig
from latentdiff.models.autoencoder import freeze, load_autoencoder, store_normaliser
from latentdiff.models.codec import LatentCodec
from latentdiff.training import messages
from latentdiff.training.autoencoder_report import LatentStatistics, codebook_picture, stage1_report, write_report
from latentdiff.training.images import Images, sweep
from latentdiff.utils import atomic
from latentdiff.utils.hashes import write_hashes
from latentdiff.utils.images import save_rows


@torch.no_grad()
def save_reconstructions(vae: nn.Module, images: Images, path: Path, count: int = 16) -> None:
    """Write a picture of `count` held-out images above their reconstructions. The autoencoder stays as it was."""
    training, trainable = vae.training, [parameter.requires_grad for parameter in vae.parameters()]
    x, _ = images.held_out_batch(count)
    device = next(vae.parameters()).device
    crop = images.preprocess.crop_content
    save_rows([crop(x), crop(LatentCodec(vae).reconstruct(x.to(device)).cpu())], path)  # the codec freezes its autoencoder
    vae.train(training)
    for parameter, trains in zip(vae.parameters(), trainable, strict=True):
        parameter.requires_grad_(trains)


def save_autoencoder(
    config: AutoencoderConfig, images: Images, vae: nn.Module, accelerator: Any, folder: Path, meta: dict[str, Any]
) -> None:
    """Publish an autoencoder: measure its latents, store the normaliser, write the folder, and a report beside it.

    Every process calls it and measures its share of the training images; the main one writes.

    Args:
        config: the run's config. With freeze_encoder the autoencoder keeps the normaliser that it has.
        images: the run's images; the report is on the held-out ones.
        vae: holds the averaged weights; it is frozen.
        accelerator: the run's.
        folder: what to write. The report goes to report.json and report.png in its parent, and a picture of the codebook, if
            it has one, to codebook.png.
        meta: what latentdiff.json holds besides the config and the data.
    """
    # Measure mean and deviation of the latents, with which stage 2 normalises them
    freeze(vae)
    if not config.freeze_encoder:
        statistics = _measure_latents(config, images, LatentCodec(vae), accelerator)
        store_normaliser(vae, statistics.mean.float(), statistics.std.float())
    if not accelerator.is_main_process:
        return

    # Write the autoencoder's folder
    data = {"source": config.data.source, "images": len(images.train), "fingerprint": images.train.fingerprint()}
    record = {"config": config.model_dump(mode="json"), **meta, "data": data}
    with atomic.new_folder(folder) as new:
        vae.save_pretrained(new, safe_serialization=True)
        write_hashes(new)
        atomic.write_json(new / "latentdiff.json", record)

    # Report how well it reconstructs held-out images; values that are not finite are part of the report
    codec = LatentCodec(load_autoencoder(str(folder)), refuse_non_finite=False)
    batches, content = sweep(images.held_out, config.train.batch_size), images.preprocess.content
    report, pairs = stage1_report(codec, batches, content, keeps_normaliser=config.freeze_encoder)
    if images.nothing_held_out:
        report["lines"].append("warn: measured on the training images, because each class has one image and none is held out")
    write_report(folder.parent, report, pairs)
    if (picture := codebook_picture(codec)) is not None:
        with atomic.new_file(folder.parent / "codebook.png") as temporary:
            picture.save(temporary, format="PNG")
    messages.save_report_lines(folder, report)
    messages.print_lines(messages.autoencoder_finished(folder, report["lines"]))


def _measure_latents(config: AutoencoderConfig, images: Images, codec: LatentCodec, accelerator: Any) -> LatentStatistics:
    """Mean and deviation of the latents of all training images, before normalisation; the same on every process."""
    own = LatentStatistics(codec.latent_channels)
    for x in sweep(images.train, config.train.batch_size, accelerator.process_index, accelerator.num_processes):
        own.update(*codec.moments(x))
    if accelerator.num_processes == 1:
        return own
    whole = LatentStatistics(codec.latent_channels)
    for state in accelerator.gather(own.state()[None].to(accelerator.device)).cpu():
        whole.merge(LatentStatistics.from_state(state))
    return whole
