"""data.copies in both stages: what is trained on, and that what is measured is measured on the images themselves."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from tiny_runs import autoencoder_config, diffusion_config, write_stripes

from latentdiff import train
from latentdiff.checkpoints import read_meta
from latentdiff.data.latent_cache import open_cache
from latentdiff.errors import UserError
from latentdiff.training import conditioning, messages, state
from latentdiff.training.dropout import replace_dropout, set_keys
from latentdiff.training.estimate import plan
from latentdiff.training.images import Images
from latentdiff.training.latents import open_inputs
from latentdiff.training.monitor import Monitor
from latentdiff.training.train_autoencoder import AutoencoderTrainer
from latentdiff.training.train_diffusion import DiffusionTrainer

MOVED = {"data__copies": 3, "data__shift": 0.2, "data__zoom": 0.1}
SHORT = {"train__steps": 4, "optimizer__schedule": "constant", "train__save_minutes": 1e-9, "train__keep": 9}


def test_what_is_measured_is_the_images_themselves(stripe_folder, tmp_path):
    plain = Images(autoencoder_config(stripe_folder, tmp_path).data, 2)
    several = Images(autoencoder_config(stripe_folder, tmp_path, **MOVED).data, 2)
    assert plain.samples is plain.train and len(several.samples) == 3 * len(several.train) == 3 * len(plain.train)
    for part in ("train", "held_out"):
        before, now = getattr(plain, part), getattr(several, part)
        assert before.fingerprint() == now.fingerprint() and len(before) == len(now)
        assert torch.equal(before.batch(torch.arange(len(now)))[0], now.batch(torch.arange(len(now)))[0])
    assert torch.equal(several.held_out_batch(5)[0], plain.held_out_batch(5)[0])
    assert several.facts() == plain.facts() | {"copies": 3} and "copies" not in plain.facts()
    assert several.report_lines()[0].startswith("36 images to train on (3 copies of each, 108 in all), 12 held out")
    assert plain.report_lines()[0].startswith("36 images to train on, 12 held out")


def test_nothing_held_out_measures_on_the_images_without_copies(tmp_path):
    data = write_stripes(tmp_path / "data", 3)
    images = Images(autoencoder_config(data, tmp_path, **MOVED).data, 2)
    assert images.nothing_held_out and len(images.held_out) == 3 and len(images.samples) == 9


def test_stage_1_trains_on_the_copies_and_goes_on_with_them(tmp_path, stripe_folder):
    for name, lengths in (("whole", [4]), ("broken", [2, 4])):
        for resume, steps in enumerate(lengths):
            config = autoencoder_config(stripe_folder, tmp_path / name, **MOVED, **SHORT | {"train__steps": steps})
            train(config, resume=bool(resume))
    whole, broken = (state.load_state(tmp_path / name)[0]["model"] for name in ("whole", "broken"))
    assert all(torch.equal(value, broken[key]) for key, value in whole.items())
    train(autoencoder_config(stripe_folder, tmp_path / "plain", **SHORT))
    plain = state.load_state(tmp_path / "plain")[0]["model"]
    assert not all(torch.equal(value, plain[key]) for key, value in whole.items())
    with pytest.raises(UserError, match="data.copies") as error:
        train(autoencoder_config(stripe_folder, tmp_path / "whole", **MOVED | {"data__copies": 2}, **SHORT), resume=True)
    assert "\n" not in str(error.value)


def test_stage_2_trains_on_the_copies_of_its_cache(tmp_path, stripe_folder, autoencoder_run, feature_folder, monkeypatch):
    seen, measured = [], []
    draw, statistics = DiffusionTrainer.image_indices, Monitor._statistics
    monkeypatch.setattr(DiffusionTrainer, "image_indices", lambda self, step: seen.append(draw(self, step)) or seen[-1])
    monkeypatch.setattr(Monitor, "_statistics", lambda self, data, n: measured.append(len(data)) or statistics(self, data, n))
    watched = {"evaluate__every": 4, "evaluate__features": str(feature_folder), "evaluate__images": 6}
    config = diffusion_config(
        stripe_folder, tmp_path / "run", autoencoder_run, **MOVED, **SHORT, **watched, train__batch_size=36
    )
    model = train(config)
    cache, images = open_cache(tmp_path / "run" / "latents"), Images(config.data, 2)
    assert len(cache) == 108 and torch.equal(cache.labels, images.train.labels.repeat_interleave(3))
    codec, _ = open_inputs(config, torch.device("cpu"))
    expected = codec.moments(images.samples.batch([100])[0])[0]
    torch.testing.assert_close(cache.moments([100])[0], expected, atol=2e-3, rtol=2e-3)
    assert sorted(torch.cat(seen[-4:])[:108].tolist()) == list(range(108))  # an epoch: each copy once
    assert measured == [36, 12]
    data = read_meta(model)["data"]
    assert data["images"] == 36 and data["fingerprint"] == images.train.fingerprint()
    before = state.load_state(tmp_path / "run")[1]["made_of"]
    assert before["data"] == images.train.latents_fingerprint()
    other = diffusion_config(
        stripe_folder, tmp_path / "other", autoencoder_run, **SHORT, cache__folder=str(tmp_path / "run" / "latents")
    )
    with pytest.raises(UserError, match="data.copies, data.shift or data.zoom .copies 3, now 1"):
        train(other)


def test_a_sample_has_the_caption_of_its_image(tmp_path, stripe_folder, monkeypatch):
    config = diffusion_config(stripe_folder, tmp_path, tmp_path, **MOVED, condition={"type": "text"})
    images = Images(config.data, 2)
    images.train.source.captions = [(str(k),) for k in range(48)]
    monkeypatch.setattr(conditioning, "_text_condition", lambda config, captions, *rest: captions)
    cache = SimpleNamespace(labels=None, manifest={"unreadable": {}})
    conditions = conditioning.prepare_conditions(config, SimpleNamespace(images=images, cache=cache), None)
    assert conditions.text.first(torch.arange(108)) == [str(int(k)) for k in images.samples.indices]


def test_an_estimate_counts_latents_of_copies_and_epochs_of_images(tmp_path, stripe_folder, autoencoder_run):
    facts = [
        plan(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **more, train__steps=9), tmp_path)
        for more in ({}, MOVED)
    ]
    plain, several = facts
    assert several["latent_cache"]["bytes"] == 3 * plain["latent_cache"]["bytes"]
    assert several["data"]["epochs"] == plain["data"]["epochs"] == 2 and several["data"]["copies"] == 3


def test_a_shift_without_copies_is_warned_of(tmp_path, stripe_folder):
    for more, expected in (({"data__shift": 0.1}, 1), (MOVED, 0), ({}, 0)):
        lines = messages.data_warnings(autoencoder_config(stripe_folder, tmp_path, **more), 36)
        assert sum(line.startswith("data.copies: 1, so data.shift") for line in lines) == expected


def test_a_streamed_table_has_copies_too(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(write_stripes(tmp_path / "stripes", 16).rglob("*.png"))
    table = pa.table({"image": [f.read_bytes() for f in files], "label": [f.parent.name for f in files]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    config = autoencoder_config(tmp_path / "a.parquet", tmp_path / "run", **MOVED, data__streaming=True)
    images, plain = Images(config.data, 2), Images(autoencoder_config(tmp_path / "stripes", tmp_path, **MOVED).data, 2)
    assert images.samples.blocks == tuple(3 * n for n in images.train.blocks)
    rows = torch.arange(len(images.samples))
    assert len(rows) == 36 and torch.equal(images.samples.batch(rows)[0], plain.samples.batch(rows)[0])
    trainer = AutoencoderTrainer.__new__(AutoencoderTrainer)
    trainer.config, trainer.images = config, images
    assert sorted(torch.cat([trainer.image_indices(step) for step in range(9)])[:36].tolist()) == list(range(36))


@pytest.mark.parametrize("cls", [UNet2DModel, UNet2DConditionModel])
def test_the_dropout_of_a_unet_acts_while_it_trains(cls):
    text = {"cross_attention_dim": 8} if cls is UNet2DConditionModel else {}
    down = ("DownBlock2D", "CrossAttnDownBlock2D" if text else "AttnDownBlock2D")
    up = ("CrossAttnUpBlock2D" if text else "AttnUpBlock2D", "UpBlock2D")
    shape = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 8), "norm_num_groups": 4}
    net = cls(**shape, layers_per_block=1, dropout=0.2, down_block_types=down, up_block_types=up, attention_head_dim=4, **text)
    layers = replace_dropout(net.train())
    assert len(layers) == sum(type(m).__name__ == "ResnetBlock2D" for m in net.modules()) == 8
    x, given = torch.randn(2, 2, 8, 8), {"encoder_hidden_states": torch.randn(2, 3, 8)} if text else {}
    made = []
    with torch.no_grad():
        for step in (0, 0, 1):
            set_keys(layers, 0, step, torch.arange(2))
            made.append(net(x, torch.tensor(5), **given).sample)
        whole = net.eval()(x, torch.tensor(5), **given).sample
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2]) and not torch.equal(made[0], whole)
