"""Both trainers, whole: what they write, that they learn, that a resumed run is the run, and what they refuse."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import autoencoder_config, diffusion_config, write_stripes

from latentdiff import checkpoints
from latentdiff.config import DataConfig
from latentdiff.data.latent_cache import open_cache
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.codec import LatentCodec
from latentdiff.training import state, train
from latentdiff.training import train_autoencoder as stage1
from latentdiff.training import train_diffusion as stage2
from latentdiff.training.images import Images, sweep

VQ = {
    "model": {
        "type": "VQModel",
        "config": {
            "block_out_channels": [8, 8],
            "layers_per_block": 1,
            "latent_channels": 3,
            "vq_embed_dim": 3,
            "norm_num_groups": 4,
            "num_vq_embeddings": 64,
            "mid_block_add_attention": False,
        },
    },
}
CRITIC = {
    "loss__adversarial": 0.5,
    "loss__adversarial_start": 2,
    "loss__discriminator_channels": 4,
    "loss__discriminator_layers": 1,
}
FLOW = {"schedule": {"name": "flow"}, "prediction": "flow", "sample__scheduler": "FlowMatchEulerDiscreteScheduler"}


def refusal(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same_state(first: Path, second: Path, step: int) -> None:
    for folder in (first, second):
        assert state.state_folders(folder)[-1].name == f"step-{step}"
    (a, meta_a), (b, meta_b) = state.load_state(first), state.load_state(second)
    assert meta_a == meta_b and {n: set(g) for n, g in a.items()} == {n: set(g) for n, g in b.items()}
    for name, group in a.items():
        for key, value in group.items():
            assert torch.equal(value, b[name][key]), f"{name} {key}"


def later(values: list[float], share: float = 0.25) -> float:
    return float(np.mean(values[-max(1, int(len(values) * share)) :]))


# Stage 1


def test_stage_1_learns_and_writes_what_it_says(autoencoder_run, stripe_folder, curves):
    logged = curves(autoencoder_run)
    assert {"train/l1", "train/l2", "train/kl", "train/total", "train/gradient_norm", "lr"} <= set(logged)
    assert logged["step"] == list(range(1, 61))
    assert later(logged["train/l1"]) < 0.6 * logged["train/l1"][0]
    total = 1.0 * logged["train/l1"][7] + 1.0 * logged["train/l2"][7] + 1e-5 * logged["train/kl"][7]
    assert logged["train/total"][7] == pytest.approx(total, rel=1e-4)
    assert json.loads((autoencoder_run / "run.json").read_text())["train"]["steps"] == 60
    report = json.loads((autoencoder_run / "report.json").read_text())
    assert report["images"] == 12 and report["psnr_db"] > 12 and report["lines"]
    Image.open(autoencoder_run / "report.png").verify()
    assert list((autoencoder_run / "logs").glob("events.*"))
    assert [p.name for p in state.state_folders(autoencoder_run)] == ["step-60"]


def test_stage_1_ends_with_the_averaged_weights_and_unit_latents(autoencoder_run, stripe_folder):
    vae = load_autoencoder(str(autoencoder_run))
    average = state.load_state(autoencoder_run)[0]["ema"]
    for key, value in vae.state_dict().items():
        assert "quant_conv" in key or torch.equal(value, average[key]), key  # those hold the normaliser too
    codec = LatentCodec(vae)
    images = Images(DataConfig(source=str(stripe_folder), size=(16, 16), channels=1, held_out=0.25), codec.factor)
    mean, std = codec.moments(torch.cat(list(sweep(images.train, 16))))
    variance = mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-3)
    torch.testing.assert_close(variance, torch.ones(2), rtol=1e-3, atol=0)
    assert vae.config.scaling_factor == 1.0 and len(images.train) == 36


def test_perceptual_and_adversarial_terms_are_logged_apart_and_start_when_told(tmp_path, stripe_folder, feature_folder, curves):
    perceptual = {"loss__perceptual": 0.5, "loss__perceptual_network": str(feature_folder)}
    train(autoencoder_config(stripe_folder, tmp_path / "run", **perceptual, **CRITIC, train__picture_every=3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    late = {"train/adversarial", "train/adaptive_weight", "train/discriminator_total", "train/discriminator_real_logits"}
    for line in lines:
        assert "train/perceptual" in line
        assert late <= set(line) if line["step"] > 2 else not late & set(line), line["step"]
    saved = state.load_state(tmp_path / "run")[0]
    assert {"discriminator", "discriminator_optimizer"} <= set(saved)
    assert {int(v) for k, v in saved["discriminator_optimizer"].items() if k.endswith(".step")} == {4}
    assert sorted(p.name for p in (tmp_path / "run" / "pictures").iterdir()) == ["step-000003.png", "step-000006.png"]


def test_vq_revives_dead_codes_and_is_normalised(tmp_path, stripe_folder, curves):
    train(autoencoder_config(stripe_folder, tmp_path / "on", **VQ, train__steps=8))
    train(autoencoder_config(stripe_folder, tmp_path / "off", **VQ, train__steps=8, revive_dead_codes=False))
    on, off = curves(tmp_path / "on"), curves(tmp_path / "off")
    assert len(on["codes/used"]) == 2  # 36 images, 8 a step: an epoch is 4 steps
    assert on["codes/used"][0] == off["codes/used"][0] < 1 and 0 < on["codes/perplexity"][0] <= 64
    assert on["codes/revived"][0] == round(64 * (1 - on["codes/used"][0])) and off["codes/revived"] == [0, 0]
    assert on["codes/used"][1] > off["codes/used"][1]
    assert "train/commitment" in on and "train/kl" not in on
    codec = LatentCodec(load_autoencoder(str(tmp_path / "on")))
    images = Images(DataConfig(source=str(stripe_folder), size=(16, 16), channels=1, held_out=0.25), codec.factor)
    z = codec.normalise(codec.moments(torch.cat(list(sweep(images.train, 16))))[0])
    assert float(z.square().mean()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_stage_1_resumed_is_the_uninterrupted_run(tmp_path, stripe_folder, kind):
    # The break at step 7 is in mid-epoch, with the codebook in use; the discriminator works before and after it
    changes = {**CRITIC, "loss__adversarial_start": 1} if kind == "kl" else VQ
    changes |= {"optimizer__warmup_steps": 9, "data__flips": True}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(autoencoder_config(stripe_folder, whole, **changes, train__steps=10))
    train(autoencoder_config(stripe_folder, broken, **changes, train__steps=7))
    assert not torch.equal(*(state.load_state(f)[0]["model"]["encoder.conv_in.weight"] for f in (whole, broken)))
    train(autoencoder_config(stripe_folder, broken, **changes, train__steps=10), resume=True)
    assert_same_state(whole, broken, 10)
    first, second = (load_file(f / "autoencoder" / "diffusion_pytorch_model.safetensors") for f in (whole, broken))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_stage_1_goes_on_from_pretrained_weights(tmp_path, stripe_folder, autoencoder_run):
    config = autoencoder_config(stripe_folder, tmp_path / "run", model={"pretrained": str(autoencoder_run)}, train__steps=1)
    train(config)
    before = load_file(autoencoder_run / "autoencoder" / "diffusion_pytorch_model.safetensors")
    after = state.load_state(tmp_path / "run")[0]["model"]
    changed = [float((after[key] - value).abs().max()) for key, value in before.items()]
    assert 0 < max(changed) < 0.02  # one step of Adam at 5e-3


def test_stage_1_in_bfloat16(tmp_path, stripe_folder, curves):
    train(autoencoder_config(stripe_folder, tmp_path / "run", train__steps=3, train__precision="bfloat16"))
    assert all(np.isfinite(curves(tmp_path / "run")["train/total"]))
    assert state.load_state(tmp_path / "run")[0]["model"]["encoder.conv_in.weight"].dtype == torch.float32


# Stage 2


def test_stage_2_learns_and_writes_what_it_says(diffusion_run, curves):
    logged = curves(diffusion_run)
    assert later(logged["train/loss"]) < 0.8 * logged["train/loss"][0]
    assert {f"train/loss_quarter{k}" for k in (1, 2, 3, 4)} <= set(logged)
    assert len(logged["validation/loss_raw"]) == len(logged["validation/loss_ema"]) == 2
    assert logged["validation/loss_raw"][1] < 0.9 and logged["validation/loss_raw"] != logged["validation/loss_ema"]
    assert sorted(p.name for p in (diffusion_run / "pictures").iterdir()) == ["step-000030.png", "step-000060.png"]
    assert len(open_cache(diffusion_run / "latents")) == 36
    assert [p.name for p in state.state_folders(diffusion_run)] == ["step-60"]


def test_stage_2_publishes_the_average_with_its_classes(diffusion_run, autoencoder_run):
    pipeline = checkpoints.load(diffusion_run / "model")
    average = state.load_state(diffusion_run)[0]["ema"]
    assert all(torch.equal(v, average[k].half().float()) for k, v in pipeline.unet.state_dict().items())
    assert pipeline.class_names == ["across", "blank", "down"] and pipeline.config.null_class == 3
    assert pipeline.unet.config.num_class_embeds == 4 and pipeline.latent_shape == (2, 8, 8)
    assert list(pipeline.config.image_size) == [16, 16] and pipeline.config.default_guidance_scale == 1.5
    meta = checkpoints.read_meta(diffusion_run / "model")
    assert meta["steps"] == meta["ema"]["updates"] == 60 and meta["data"]["images"] == 36
    assert meta["autoencoder"]["fingerprint"] == LatentCodec(load_autoencoder(str(autoencoder_run))).fingerprint()
    assert meta["latents"]["std"] == pytest.approx([1, 1], rel=0.01) and meta["config"]["stage"] == "diffusion"


def test_without_dropout_there_is_no_null_class(tmp_path, stripe_folder, autoencoder_run):
    changes = dict(condition__dropout=0.0, train__steps=1, sample__guidance_interval=[0.2, 0.9])
    model = train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes))
    pipeline = checkpoints.load(model)
    assert list(pipeline.config.default_guidance_interval) == [0.2, 0.9]
    assert pipeline.config.null_class is None and pipeline.unet.config.num_class_embeds == 3
    assert pipeline.config.default_guidance_scale == 1.0
    with pytest.raises(ValueError, match="without class dropout"):
        pipeline(class_labels=[0], guidance_scale=2.0)


def test_without_a_condition_the_model_is_unconditional(tmp_path, stripe_folder, autoencoder_run):
    config = diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, condition__type="none", train__steps=1)
    pipeline = checkpoints.load(train(config))
    assert pipeline.num_classes == 0 and pipeline.class_names == []


@pytest.fixture
def seen(monkeypatch):
    """What each training step gives to the loss: a list of {t, labels, x0, weighting}."""
    steps: list[dict] = []
    network, loss = Denoiser.output, stage2.weighted_error

    def network_spy(denoiser, x, t, **conditioning):
        if torch.is_grad_enabled():
            steps.append({"labels": conditioning.get("class_labels")})
        return network(denoiser, x, t, **conditioning)

    def loss_spy(denoiser, output, x0, noise, t, weighting="none", gamma=5.0):
        steps[-1] |= {"t": t, "x0": x0, "weighting": weighting}
        return loss(denoiser, output, x0, noise, t, weighting, gamma)

    monkeypatch.setattr(Denoiser, "output", network_spy)
    monkeypatch.setattr(stage2, "weighted_error", loss_spy)
    return steps


def run_stage_2(tmp_path, name, data, autoencoder, **changes):
    # One cache serves them all, as far as it may
    changes = {"cache__folder": str(tmp_path / "latents"), "train__steps": 4, "train__batch_size": 64} | changes
    train(diffusion_config(data, tmp_path / name, autoencoder, **changes))


def test_labels_are_dropped_per_sample_at_the_rate_asked_for(tmp_path, stripe_folder, autoencoder_run, seen):
    for dropout, low, high in ((0.5, 0.35, 0.65), (0.1, 0.03, 0.2)):
        seen.clear()
        run_stage_2(tmp_path, f"drop{dropout}", stripe_folder, autoencoder_run, condition__dropout=dropout)
        labels = torch.cat([step["labels"] for step in seen])
        assert low < float((labels == 3).float().mean()) < high and set(labels.tolist()) == {0, 1, 2, 3}


def test_noise_levels_and_weighting_reach_the_loss(tmp_path, stripe_folder, autoencoder_run, seen, curves):
    high = {"noise_levels": {"name": "logit_normal", "params": {"mean": 1.5, "std": 0.5}}}
    run_stage_2(tmp_path, "uniform", stripe_folder, autoencoder_run)
    run_stage_2(tmp_path, "high", stripe_folder, autoencoder_run, **high)
    run_stage_2(tmp_path, "min_snr", stripe_folder, autoencoder_run, weighting="min_snr")
    uniform, high, min_snr = (torch.cat([s["t"] for s in seen[k : k + 4]]) for k in (0, 4, 8))
    assert abs(float(uniform.mean()) - 0.5) < 0.08 and abs(float(high.mean()) - 0.8) < 0.05
    assert float(high.std()) < 0.5 * float(uniform.std()) and torch.equal(uniform, min_snr)
    assert [s["weighting"] for s in seen[8:]] == ["min_snr"] * 4
    first = [curves(tmp_path / name)["train/loss"][0] for name in ("uniform", "min_snr")]
    assert first[1] < first[0]  # the weight is at most 1, and below it where there is little noise


def test_each_epoch_draws_fresh_latents_unless_means_are_asked_for(tmp_path, stripe_folder, autoencoder_run, seen):
    data = write_stripes(tmp_path / "data", 9)  # 7 to train on: a batch of 7 is an epoch
    for name, use_mean in (("draw", False), ("mean", True)):
        run_stage_2(
            tmp_path,
            name,
            data,
            autoencoder_run,
            cache__use_mean=use_mean,
            train__batch_size=7,
            data__held_out=0.2,
            normaliser="measured",
        )
    epochs = [step["x0"].flatten(1).sort(0).values for step in seen]
    assert len({tuple(e[:, 0].tolist()) for e in epochs[:4]}) == 4
    assert len({tuple(e[:, 0].tolist()) for e in epochs[4:]}) == 1


def test_flips_reach_the_latents(tmp_path, stripe_folder, autoencoder_run, seen):
    run_stage_2(tmp_path, "plain", stripe_folder, autoencoder_run, train__steps=1)
    run_stage_2(
        tmp_path,
        "flips",
        stripe_folder,
        autoencoder_run,
        train__steps=1,
        data__flips=True,
        cache__folder=str(tmp_path / "flipped"),
    )
    same = (seen[0]["x0"] == seen[1]["x0"]).flatten(1).all(1).float().mean()
    assert 0.25 < float(same) < 0.75 and open_cache(tmp_path / "flipped").has_flips


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "epsilon", "schedule": {"name": "vp"}},
        {"prediction": "v_prediction", "schedule": {"name": "cosine"}, "sample__scheduler": "DDIMScheduler"},
        {"prediction": "sample", "schedule": {"name": "ddpm-scaled-linear"}},
        {**FLOW, "noise_levels": {"name": "logit_normal", "params": {}}},
        {
            "model__type": "UNet2DConditionModel",
            "model__config": {
                "block_out_channels": [8],
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "cross_attention_dim": 8,
                "down_block_types": ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"],
                "mid_block_type": None,
            },
        },
    ],
    ids=["epsilon", "v_prediction", "sample", "flow", "condition-unet"],
)
def test_every_prediction_trains_and_samples(tmp_path, stripe_folder, autoencoder_run, changes):
    model = train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes, train__steps=2))
    pipeline = checkpoints.load(model)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.prediction == changes.get("prediction", "epsilon")
    for sampler in (None, "ddim"):
        call = {"class_labels": [0, "blank"], "sampler": sampler, "guidance_scale": 2.0, "output_type": "np"}
        images = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
        assert images.shape == (2, 16, 16, 1) and np.isfinite(images).all()


@pytest.mark.parametrize("changes", [{}, {**FLOW, "data__flips": True, "weighting": "min_snr"}], ids=["epsilon", "flow"])
def test_stage_2_resumed_is_the_uninterrupted_run(tmp_path, stripe_folder, autoencoder_run, changes, curves):
    changes = {**changes, "optimizer__warmup_steps": 4, "model__config__dropout": 0.2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(diffusion_config(stripe_folder, whole, autoencoder_run, **changes, train__steps=7))
    train(diffusion_config(stripe_folder, broken, autoencoder_run, **changes, train__steps=3))
    train(diffusion_config(stripe_folder, broken, autoencoder_run, **changes, train__steps=7), resume=True)
    assert_same_state(whole, broken, 7)
    for part in ("unet", "vae"):
        files = [f / "model" / part / "diffusion_pytorch_model.safetensors" for f in (whole, broken)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert curves(whole)["train/loss"][3:] == curves(broken)["train/loss"][3:]
    assert curves(whole)["validation/loss_ema"][-1] == curves(broken)["validation/loss_ema"][-1]


def test_the_seed_decides_the_run(tmp_path, stripe_folder, autoencoder_run):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_stage_2(tmp_path, name, stripe_folder, autoencoder_run, seed=seed, train__steps=2, train__batch_size=8)
    assert_same_state(tmp_path / "a", tmp_path / "b", 2)
    weights = [state.load_state(tmp_path / name)[0]["model"]["conv_in.weight"] for name in "ac"]
    assert not torch.equal(*weights)


# What is refused


def test_a_run_is_not_written_over(autoencoder_run, diffusion_run, stripe_folder):
    before = sorted(autoencoder_run.rglob("*")), sorted(diffusion_run.rglob("*"))
    for config in (
        autoencoder_config(stripe_folder, autoencoder_run),
        diffusion_config(stripe_folder, diffusion_run, autoencoder_run),
    ):
        assert "holds a training run already; continue it with --resume" in refusal(lambda c=config: train(c))
    assert before == (sorted(autoencoder_run.rglob("*")), sorted(diffusion_run.rglob("*")))


def test_resume_needs_the_same_run(tmp_path, autoencoder_run, stripe_folder):
    assert "there is no run to resume" in refusal(
        lambda: train(autoencoder_config(stripe_folder, tmp_path / "none"), resume=True)
    )
    assert not (tmp_path / "none").exists()
    changed = autoencoder_config(stripe_folder, autoencoder_run, seed=3)
    assert "run.json: seed differs" in refusal(lambda: train(changed, resume=True))
    changed = autoencoder_config(stripe_folder, autoencoder_run, train__batch_size=2)  # would move the order of the data
    assert "run.json: train.batch_size differs" in refusal(lambda: train(changed, resume=True))


def test_a_cache_of_another_autoencoder_is_refused(tmp_path, stripe_folder, autoencoder_run, diffusion_run):
    train(autoencoder_config(stripe_folder, tmp_path / "other", seed=1, train__steps=1))
    latents = diffusion_run / "latents"
    before = {p: p.read_bytes() for p in latents.iterdir()}
    config = diffusion_config(stripe_folder, tmp_path / "run", tmp_path / "other", cache__folder=str(latents))
    message = refusal(lambda: train(config))
    assert "other autoencoder weights" in message and str(latents) in message
    assert {p: p.read_bytes() for p in latents.iterdir()} == before and not (tmp_path / "run").exists()


def test_a_normaliser_that_the_latents_contradict_is_refused_unless_measured(tmp_path, stripe_folder, autoencoder_run):
    shutil.copytree(autoencoder_run / "autoencoder", tmp_path / "stage1")
    path = tmp_path / "stage1" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 5.0}))
    message = refusal(lambda: train(diffusion_config(stripe_folder, tmp_path / "run", tmp_path / "stage1")))
    # Folded in, the normaliser gives 1 over the training set, so a scaling of 5 gives 5, up to the noise of one draw
    said = re.search(r"root mean square of ([\d.]+) instead of 1; set normaliser=measured", message)
    assert said and float(said[1]) == pytest.approx(5, rel=0.005)
    assert not (tmp_path / "run" / "state").exists()
    model = train(diffusion_config(stripe_folder, tmp_path / "run", tmp_path / "stage1", normaliser="measured", train__steps=1))
    vae = checkpoints.load(model).vae
    assert vae.config.scaling_factor == 1.0 and vae.config.latents_std == pytest.approx([1, 1], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": {"name": "flw"}}, "flw"),
        ({"noise_levels": {"name": "normal"}}, "normal"),
        ({"noise_levels": {"name": "uniform", "params": {"std": 1}}}, "std"),
        ({"sample__scheduler": "DDMPScheduler"}, "DDMPScheduler"),
        ({**FLOW, "sample__scheduler": "DDIMScheduler"}, "DDIMScheduler"),
        ({"prediction": "flow"}, "flow"),
        ({"model__type": "Unet"}, "model.type: 'Unet' is not one of UNet2DModel, UNet2DConditionModel"),
        ({"model__config__layers_per_blok": 2}, "did you mean 'layers_per_block'?"),
        ({"model__config__in_channels": 2}, "model.config.in_channels: leave it out"),
        ({"model__config__norm_num_groups": 3}, "model.config: UNet2DModel refuses it"),
        ({"data__channels": 3}, "data.channels: 3, but the autoencoder"),
        ({"data__size": [15, 16]}, "not a multiple of 2"),
        ({"condition__dropout": 1.0}, "dropout"),
    ],
)
def test_stage_2_refuses_before_anything_is_trained(tmp_path, stripe_folder, autoencoder_run, changes, said):
    message = refusal(lambda: train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes)))
    assert said in message
    assert {p.name for p in tmp_path.rglob("*")} <= {"run", "latents", "manifest.json", "shard-00000.safetensors"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {}}, "model: set type"),
        ({"model__type": "AutoencoderTiny"}, "model.type: 'AutoencoderTiny'"),
        ({"loss__perceptual": 1.0}, "loss.perceptual_network"),
        ({"loss__perceptual": 1.0, "loss__perceptual_network": "nowhere"}, "nowhere"),
        ({"loss__l1": 0.0, "loss__l2": 0.0}, "l1"),
        ({"data__source": "nowhere"}, "data 'nowhere': no such folder"),
        ({"data__size": [15, 16]}, "not a multiple of 2"),
        ({"data__size": [8, 8]}, "framing=exact, which takes images of one size"),
    ],
)
def test_stage_1_refuses_before_anything_is_written(tmp_path, stripe_folder, changes, said):
    assert said in refusal(lambda: train(autoencoder_config(stripe_folder, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


def test_unlabelled_images_cannot_have_a_class_condition(tmp_path, stripe_folder, autoencoder_run):
    (tmp_path / "flat").mkdir()
    for k, path in enumerate(sorted(stripe_folder.rglob("*.png"))):
        shutil.copy(path, tmp_path / "flat" / f"{k}.png")
    config = diffusion_config(tmp_path / "flat", tmp_path / "run", autoencoder_run)
    assert "set condition.type=none" in refusal(lambda: train(config))
    train(diffusion_config(tmp_path / "flat", tmp_path / "run", autoencoder_run, condition__type="none", train__steps=1))


def test_the_stage_that_a_config_names_is_run(monkeypatch, stripe_folder, tmp_path):
    assert stage1.train_autoencoder and stage2.train_diffusion
    monkeypatch.setattr(stage1, "train_autoencoder", lambda config, resume, began: ("one", resume))
    monkeypatch.setattr(stage2, "train_diffusion", lambda config, resume, began: ("two", resume))
    assert train(autoencoder_config(stripe_folder, tmp_path)) == ("one", False)
    assert train(diffusion_config(stripe_folder, tmp_path, tmp_path), resume=True) == ("two", True)
