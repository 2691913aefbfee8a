"""The frozen first stage: any diffusers autoencoder, one normaliser, one fingerprint."""

import json

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_vae

from latentdiff.errors import UserError
from latentdiff.models.autoencoder import (
    build_autoencoder,
    fold_normaliser,
    load_autoencoder,
    set_normaliser,
    store_normaliser,
)
from latentdiff.models.codec import LatentCodec
from latentdiff.pipelines.latent_diffusion import denormalise

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_vq(**config) -> VQModel:
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    sizes = dict(in_channels=1, out_channels=1, block_out_channels=(4, 4, 4), latent_channels=4, vq_embed_dim=3)
    return VQModel(**{**blocks, **sizes, "norm_num_groups": 2, "num_vq_embeddings": 8, **config}).eval()


def tiny_tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=5,
    )


def tiny_dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(4, 8, 8),
        encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )


KINDS = {  # class: (make, factor, latent channels, image channels, has a posterior)
    "AutoencoderKL": (tiny_vae, 2, 4, 1, True),
    "VQModel": (tiny_vq, 4, 3, 1, False),
    "AutoencoderTiny": (tiny_tiny, 4, 5, 3, False),
    "AutoencoderDC": (tiny_dc, 4, 4, 3, False),
}


def images(channels=1, n=3, seed=0, height=16, width=24):
    return torch.rand((n, channels, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("place", [".", "vae", "autoencoder"])
def test_any_diffusers_autoencoder_is_a_first_stage(tmp_path, name, place):
    make, factor, latent_channels, image_channels, posterior = KINDS[name]
    torch.manual_seed(0)
    made = make()
    made.save_pretrained(tmp_path / place)
    vae = load_autoencoder(str(tmp_path))
    assert type(vae).__name__ == name and not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    codec = LatentCodec(vae)
    assert (codec.factor, codec.latent_channels, codec.image_channels) == (factor, latent_channels, image_channels)
    x = images(image_channels)
    mean, std = codec.moments(x)
    assert mean.shape == std.shape == (3, latent_channels, 16 // factor, 24 // factor)
    assert bool((std > 0).all()) if posterior else bool((std == 0).all())
    assert codec.decode(codec.normalise(mean)).shape == x.shape
    for a, b in zip(codec.moments(x[1:2]), (mean[1:2], std[1:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # nothing mixes samples
    assert codec.fingerprint() == LatentCodec(made).fingerprint()


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 0.5, "shift_factor": 0.25},
        {"scaling_factor": 2.0, "latents_mean": [0.0, 1.0, 2.0, 3.0], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
def test_the_normaliser_is_read_from_the_config_and_the_pipeline_agrees(config):
    vae = tiny_vae(**config)
    codec = LatentCodec(vae)
    z = torch.randn((2, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(config.get("latents_mean", [config.get("shift_factor", 0.0)] * 4))[:, None, None]
    std = torch.tensor(config.get("latents_std", [1.0] * 4))[:, None, None]
    torch.testing.assert_close(codec.normalise(z), (z - mean) / std * config["scaling_factor"])
    torch.testing.assert_close(codec.denormalise(codec.normalise(z)), z)
    torch.testing.assert_close(denormalise(codec.normalise(z), vae.config), z)


def test_folding_gives_unit_latents_and_keeps_reconstructions():
    torch.manual_seed(0)
    codec = LatentCodec(tiny_vae())
    x = images(n=64)
    before, (mean, std) = codec.reconstruct(x), codec.moments(x)
    m = mean.mean((0, 2, 3))
    s = (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()
    vae = tiny_vae()
    vae.load_state_dict(codec.vae.state_dict())
    fold_normaliser(vae, m, s)
    folded = LatentCodec(vae)
    new_mean, new_std = folded.moments(x)
    torch.testing.assert_close(new_mean, (mean - m[:, None, None]) / s[:, None, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_std, std / s[:, None, None], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(new_mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    variance = new_mean.var((0, 2, 3), correction=0) + new_std.square().mean((0, 2, 3))
    torch.testing.assert_close(variance, torch.ones(4), rtol=1e-4, atol=0)
    torch.testing.assert_close(folded.reconstruct(x), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(folded.normalise(new_mean), new_mean)  # nothing is left for the config to do
    assert vae.config.scaling_factor == 1.0


@pytest.mark.parametrize("make", [tiny_vq, lambda: tiny_vae(use_quant_conv=False, use_post_quant_conv=False)])
def test_what_cannot_be_folded_keeps_its_weights_and_gets_a_normaliser(make):
    torch.manual_seed(0)
    vae = make()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    codec, x = LatentCodec(vae), images(n=64)
    mean, std = codec.moments(x)
    m, s = mean.mean((0, 2, 3)), (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()
    store_normaliser(vae, m, s)
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())
    stored = LatentCodec(vae)
    normalised, noise = stored.normalise(mean), std * stored.scale[:, None, None]
    assert float(normalised.square().mean() + noise.square().mean()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("place", [".", "vae"])
def test_vq_latents_are_normalised_channel_by_channel(tmp_path, place):
    torch.manual_seed(0)
    vae = tiny_vq()
    with torch.no_grad():  # channels of quite different spread and centre
        vae.quant_conv.weight *= torch.tensor([0.1, 1.0, 10.0])[:, None, None, None]
        vae.quant_conv.bias.copy_(torch.tensor([0.5, -1.0, 3.0]))
    raw = LatentCodec(vae).moments(images(n=64))[0]
    store_normaliser(vae, raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0))
    vae.save_pretrained(tmp_path / place)
    loaded = load_autoencoder(str(tmp_path))
    codec = LatentCodec(loaded)
    z = codec.normalise(raw)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-4, atol=0)
    torch.testing.assert_close(denormalise(z, loaded.config), raw, rtol=1e-4, atol=1e-5)  # as the pipeline does it
    config = json.loads((tmp_path / place / "config.json").read_text())
    assert config["scaling_factor"] == 1.0 and len(config["latents_mean"]) == len(config["latents_std"]) == 3


@pytest.mark.parametrize("lookup", [False, True])
def test_codes_are_the_nearest_rows_and_decode_to_the_reconstruction(lookup):
    torch.manual_seed(0)
    codec, x = LatentCodec(tiny_vq(lookup_from_codebook=lookup)), images()
    with torch.no_grad():
        codec.vae.quantize.embedding.weight.copy_(codec.moments(images(seed=1))[0].movedim(1, -1).reshape(-1, 3)[:64:8])
    assert (codec.num_codes, codec.code_levels) == (8, 1)
    codes = codec.codes(x)
    assert codes.shape == (3, 1, 4, 6) and codes.dtype == torch.int64 and len(codes.unique()) > 4
    z, rows = codec.moments(x)[0].movedim(1, -1), codec.vae.quantize.embedding.weight
    assert torch.equal(codes[:, 0], (z[..., None, :] - rows).square().sum(-1).argmin(-1))
    assert torch.equal(codec.codes(x[1:2]), codes[1:2])
    torch.testing.assert_close(codec.decode_codes(codes), codec.reconstruct(x), rtol=1e-5, atol=1e-6)
    other = codes.clone()
    other[0, 0, 0, 0] = (codes[0, 0, 0, 0] + 1) % 8
    changed = (codec.decode_codes(other) - codec.decode_codes(codes)).abs().amax((1, 2, 3))
    assert changed[0] > 0 and not changed[1:].any()


def test_codes_outside_the_codebook_and_autoencoders_without_one_are_refused():
    codec = LatentCodec(tiny_vq())
    codes = torch.zeros(2, 1, 4, 6, dtype=torch.int64)
    for wrong, message in [
        (codes - 1, "from 0 to 7; these are from -1 to -1"),
        (codes + 8, "from 0 to 7; these are from 8 to 8"),
        (codes[:, 0], r"int64 \[B, 1, h, w\], not int64 \(2, 4, 6\)"),
        (codes.expand(2, 2, 4, 6), r"int64 \[B, 1, h, w\]"),
        (codes.float(), "not float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            codec.decode_codes(wrong)
    continuous = LatentCodec(tiny_vae())
    assert continuous.num_codes is None and continuous.code_levels == 0
    for call in (lambda: continuous.codes(images()), lambda: continuous.decode_codes(codes)):
        with pytest.raises(UserError, match="AutoencoderKL has no codebook"):
            call()


def test_a_vq_model_with_one_scale_for_all_channels_still_loads(tmp_path):
    torch.manual_seed(0)
    tiny_vq(scaling_factor=0.5).save_pretrained(tmp_path)
    codec = LatentCodec(load_autoencoder(str(tmp_path)))
    z = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(codec.normalise(z), 0.5 * z)


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_gradients_reach_latents_through_the_decoder(name):
    """The slope along a random direction, against a difference quotient in float64."""
    make, _, channels, *_ = KINDS[name]
    torch.manual_seed(0)
    codec = LatentCodec(make())
    z, direction = torch.randn(2, channels, 4, 4), torch.randn(2, channels, 4, 4)
    assert not codec.decode(z).requires_grad  # nothing is kept where nobody asks
    at = z.clone().requires_grad_()
    codec.decode(at).square().sum().backward()
    assert all(parameter.grad is None for parameter in codec.vae.parameters())

    def value(step):
        return codec.decode(z + step * direction).double().square().sum()

    step = 1e-3  # float32: the quotient's error is about eps |value| / step = 1e-7 1e2 / 1e-3
    slope = float((value(step) - value(-step)) / (2 * step))
    assert float((at.grad * direction).sum()) == pytest.approx(slope, rel=0.02, abs=0.1)


def test_a_draw_of_latents_is_the_posterior_s():
    torch.manual_seed(0)
    vae = tiny_vae(scaling_factor=0.5, shift_factor=0.1)
    codec, x = LatentCodec(vae), images()
    mean, std = codec.moments(x)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    drawn = codec.latents(x, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, codec.normalise(mean + std * noise))
    assert torch.equal(codec.latents(x, use_mean=True), codec.normalise(mean))
    alone = codec.latents(x[1:2], [torch.Generator().manual_seed(8)])
    many = codec.latents(x, [torch.Generator().manual_seed(k) for k in (7, 8, 9)])
    torch.testing.assert_close(alone, many[1:2], rtol=1e-4, atol=1e-5)


def test_the_fingerprint_is_of_weights_and_config(tmp_path):
    torch.manual_seed(0)
    vae = tiny_vae()
    first = LatentCodec(vae).fingerprint()
    vae.save_pretrained(tmp_path / "copy")
    assert LatentCodec(load_autoencoder(str(tmp_path / "copy"))).fingerprint() == first and len(first) == 64
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    second = LatentCodec(vae).fingerprint()
    of_latents = LatentCodec(vae).fingerprint(latents_only=True)
    with torch.no_grad():
        vae.decoder.conv_in.weight.zero_()
        vae.post_quant_conv.bias.zero_()
    assert LatentCodec(vae).fingerprint(latents_only=True) == of_latents != LatentCodec(vae).fingerprint()
    with torch.no_grad():
        vae.quant_conv.bias[0] += 1e-6
    assert LatentCodec(vae).fingerprint(latents_only=True) != of_latents
    set_normaliser(vae, torch.zeros(4), torch.full((4,), 2.0))
    third = LatentCodec(vae).fingerprint()
    assert len({first, second, third}) == 3
    encoded = LatentCodec(vae).fingerprint(latents_only=True)
    set_normaliser(vae, torch.ones(4), torch.ones(4))  # raw latents know nothing of it
    assert LatentCodec(vae).fingerprint(latents_only=True) == encoded


def test_a_new_autoencoder_starts_with_the_posterior_asked_for():
    config = {"block_out_channels": [4, 4], "norm_num_groups": 2, "latent_channels": 2}
    codec = LatentCodec(build_autoencoder("AutoencoderKL", config, 1, -4.0))
    torch.testing.assert_close(codec.moments(images())[1], torch.full((3, 2, 8, 12), 1.0) * torch.tensor(-2.0).exp())
    assert LatentCodec(build_autoencoder("AutoencoderKL", config, 3, None)).image_channels == 3


def refusal(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_built_is_one_line():
    assert "model.type: 'AutoencoderTiny' is not one of AutoencoderKL, VQModel" in refusal(
        lambda: build_autoencoder("AutoencoderTiny", {}, 1, None)
    )
    assert "model.config.latent_chanels: unknown argument of AutoencoderKL; did you mean 'latent_channels'?" in refusal(
        lambda: build_autoencoder("AutoencoderKL", {"latent_chanels": 4}, 1, None)
    )
    assert refusal(
        lambda: build_autoencoder("AutoencoderKL", {"block_out_channels": [5], "norm_num_groups": 2}, 1, None)
    ).startswith("model.config: AutoencoderKL refuses it")


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    assert f"{tmp_path}: no autoencoder there" in refusal(lambda: load_autoencoder(str(tmp_path)))
    missing = str(tmp_path / "missing")
    assert f"{missing}: no autoencoder there" in refusal(lambda: load_autoencoder(missing))
    torch.manual_seed(0)
    tiny_vae().save_pretrained(tmp_path)
    weights, config = tmp_path / WEIGHTS, tmp_path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"{weights}: truncated" in refusal(lambda: load_autoencoder(str(tmp_path)))
    weights.unlink()
    assert f"{weights}: missing" in refusal(lambda: load_autoencoder(str(tmp_path)))
    weights.write_bytes(whole)
    some = load_file(weights)
    del some["decoder.conv_out.bias"]
    save_file(some, weights, {"format": "pt"})
    assert "decoder.conv_out.bias" in refusal(lambda: load_autoencoder(str(tmp_path)))  # never left at random
    weights.write_bytes(whole)
    config.write_text(json.dumps({**json.loads(text), "_class_name": "UNet2DModel"}))
    assert "'UNet2DModel' is not one of AutoencoderKL" in refusal(lambda: load_autoencoder(str(tmp_path)))
    config.write_text(json.dumps({**json.loads(text), "latent_channels": 7}))
    assert f"{weights}: cannot read the weights" in refusal(lambda: load_autoencoder(str(tmp_path)))
    config.write_text("{")
    assert f"{config}: not valid JSON" in refusal(lambda: load_autoencoder(str(tmp_path)))


def test_images_that_do_not_fit_are_one_line():
    codec = LatentCodec(tiny_vae())
    assert "expected [B, 1, H, W]; set data.channels=1" in refusal(lambda: codec.moments(images(3)))
    assert "images of 15x24: the autoencoder needs sides divisible by 2" in refusal(lambda: codec.moments(images(height=15)))


def test_an_autoencoder_in_half_precision_works():
    vae: AutoencoderKL = tiny_vae().to(torch.bfloat16)
    codec = LatentCodec(vae)
    mean, _ = codec.moments(images())
    assert mean.dtype == torch.float32 and codec.decode(codec.normalise(mean)).dtype == torch.float32
