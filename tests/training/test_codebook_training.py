"""Stage 1 with a codebook: what moves it, what revival leaves behind, and from images through both stages to images."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from planted import planted
from tiny_runs import autoencoder_config, diffusion_config

import latentdiff
from latentdiff.cli import main
from latentdiff.errors import UserError
from latentdiff.evaluation.measure_likelihood import measure_likelihood
from latentdiff.models.autoencoder import load_autoencoder, with_codes
from latentdiff.models.codebook import codebooks, codes_of
from latentdiff.models.codec import LatentCodec
from latentdiff.training import state, train
from latentdiff.training import train_autoencoder as stage1
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.autoencoder_report import codebook_picture
from latentdiff.training.images import Images

SIZES = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
CODES = {**SIZES, "vq_embed_dim": 3, "num_vq_embeddings": 64}
VQ = {"model": {"type": "VQModel", "config": CODES}}
RESIDUAL = {"model": {"type": "ResidualVQModel", "config": {**CODES, "num_vq_embeddings": 16, "num_quantizers": 2}}}
GRID = {"model": {"type": "FSQModel", "config": {**SIZES, "fsq_levels": [5, 4, 3]}}}
MEANS = {"codebook": {"update": "ema", "start": "data", "revive_every": 3}}
BOOK = "quantize.embedding.weight"


@pytest.fixture
def stage_1(stripe_folder, tmp_path):
    """stage_1(**changes) -> the trainer of a stage-1 run before its first step."""

    def build(**changes):
        config = autoencoder_config(stripe_folder, tmp_path / "run", **changes)
        torch.manual_seed(0)
        vae = stage1.make_autoencoder(config)
        images = Images(config.data, stage1.LatentCodec(vae).factor)
        trainer = stage1.AutoencoderTrainer(config, vae, images, start_accelerator(config.train))
        if config.codebook.start == "data":
            trainer.start_codebook()
        return trainer

    return build


def first_images(trainer):
    return trainer.images.train.batch(torch.arange(8))[0]


# What moves the codebook


def check_commitment(forward, trainer):
    """Running means move the codebook; the loss is 0.25 |z - sg(e)|^2 alone, in value and gradient."""
    out = forward(trainer.model, first_images(trainer))
    z, books = out["latents"], codebooks(trainer.model.vae)
    rest, expected, pull = z.detach().movedim(1, -1).reshape(-1, 3), 0.0, 0.0
    for book, chosen in zip(books, out["codes"].view(-1, len(books)).unbind(1), strict=True):
        rest = rest - book[chosen]
        expected = expected + 0.25 * rest.square().mean()
        pull = pull + 0.5 * rest / rest.numel()
    torch.testing.assert_close(out["commitment"].detach(), expected)
    (of_z,) = torch.autograd.grad(out["commitment"], z)
    torch.testing.assert_close(of_z.movedim(1, -1).reshape(-1, 3), pull)


@pytest.mark.parametrize("kind", [VQ, RESIDUAL], ids=["vq", "residual"])
def test_with_running_means_the_loss_is_the_commitment_alone(stage_1, kind):
    trainer = stage_1(**kind, **MEANS)
    check_commitment(stage1.EncoderDecoder.forward, trainer)
    with pytest.raises(AssertionError):
        check_commitment(planted(stage1.EncoderDecoder.forward, ("commitment.detach() / (1 + ", "0 / (1 + ")), trainer)
    trainer.model.vae.quantize.legacy = True  # diffusers' weight on the wrong term
    if kind is VQ:
        with pytest.raises(AssertionError):
            check_commitment(stage1.EncoderDecoder.forward, trainer)


def check_step(update, trainer):
    """One step with running means: the codebook is theirs, and neither the optimizer's nor left as it was."""
    vae, x = trainer.model.vae, first_images(trainer)
    before = codebooks(vae).detach().clone()
    with torch.no_grad():
        latents = vae.encode(x).latents
        codes = codes_of(vae, latents).movedim(1, -1).reshape(-1, len(before))
    counts = torch.bincount(codes[:, 0], minlength=before.shape[1])
    sums = torch.zeros_like(before[0]).index_add_(0, codes[:, 0], latents.movedim(1, -1).reshape(-1, 3))
    update(trainer, x, 0, 1e-3)
    n, m = 0.99 + 0.01 * counts, 0.99 * before[0] + 0.01 * sums
    torch.testing.assert_close(codebooks(vae)[0].detach(), m / n[:, None], rtol=1e-3, atol=1e-6)
    assert not torch.equal(codebooks(vae), before)
    average = trainer.ema.average[BOOK].view_as(before)
    torch.testing.assert_close(average, before.lerp(codebooks(vae).detach(), 1 - trainer.ema.decay_at(1)))


def test_a_step_moves_the_codebook_by_running_means(stage_1):
    check_step(stage1.AutoencoderTrainer.update, stage_1(**VQ, **MEANS))
    trainer = stage_1(**VQ, **MEANS)
    trainer.ema.frozen.add(BOOK)  # as the averaged weights take what has no gradient
    with pytest.raises(AssertionError):
        check_step(stage1.AutoencoderTrainer.update, trainer)


def test_a_step_that_is_not_finite_leaves_the_codebook_and_its_means(stage_1):
    trainer = stage_1(**VQ, **MEANS)
    before = {key: value.clone() for key, value in trainer.state_tensors()["codes"].items()}
    book = trainer.model.vae.quantize.embedding.weight.clone()
    _, finite = trainer.update(first_images(trainer) * float("nan"), 0, 1e-3)
    assert not finite and torch.equal(trainer.model.vae.quantize.embedding.weight, book)
    assert all(torch.equal(value, before[key]) for key, value in trainer.state_tensors()["codes"].items())


def test_pieces_of_a_batch_move_the_codebook_as_the_batch_does(stage_1):
    books = []
    for pieces in (None, 3):
        trainer = stage_1(**RESIDUAL, **MEANS, train__micro_batch=pieces, optimizer__eps=1e-3)
        trainer.update(first_images(trainer), 0, 1e-3)
        books.append(trainer.model.vae.quantize.embedding.weight.detach().clone())
    torch.testing.assert_close(books[0], books[1], rtol=1e-4, atol=1e-6)


def test_a_codebook_that_starts_from_data_holds_latents_of_the_first_batch(stage_1):
    trainer = stage_1(**VQ, **MEANS)
    with torch.no_grad():
        latents = trainer.model.vae.encode(trainer.read_images(0)).latents.movedim(1, -1).reshape(-1, 3)
    trainer.stop_reading()
    book = trainer.model.vae.quantize.embedding.weight.detach()
    assert bool((book[:, None] == latents).all(-1).any(1).all()) and len(book.unique(dim=0)) > 32
    assert torch.equal(trainer.ema.average[BOOK], book)


# Revival


def check_revival(revive, trainer):
    """New codes begin without the moments, means and averages of the old ones; the others keep theirs."""
    x, vae = first_images(trainer), trainer.model.vae
    for step in range(3):
        trainer.update(x, step, 1e-2)
    weight, means = vae.quantize.embedding.weight, trainer.codebook_ema
    rows = trainer.code_usage.counts.nonzero().flatten()[:2]  # codes that were used, so there is something to drop
    kept = torch.ones(len(weight), dtype=torch.bool)
    kept[rows] = False
    moments = {k: v for k, v in trainer.optimizer.state.get(weight, {}).items() if k != "step"}
    steps = trainer.optimizer.state[weight]["step"].clone() if moments else None
    assert set(moments) == ({"exp_avg", "exp_avg_sq"} if means is None else set())
    old, average, before = (
        weight.detach().clone(),
        trainer.ema.average[BOOK].clone(),
        {k: v.clone() for k, v in moments.items()},
    )
    assert all(bool((v[rows] != 0).any(1).all()) for v in moments.values())
    counts = torch.ones_like(trainer.code_usage.counts)
    counts[rows] = 0
    assert revive(trainer, counts, trainer.last_latents, "revive", 5, publish=True) == 2
    assert torch.equal(weight[kept], old[kept]) and bool((weight != old)[rows].any(1).all())
    for name, moment in moments.items():
        assert bool((moment[rows] == 0).all()) and torch.equal(moment[kept], before[name][kept])
    assert not moments or trainer.optimizer.state[weight]["step"] == steps
    assert torch.equal(trainer.ema.average[BOOK][rows], weight.detach()[rows])
    assert torch.equal(trainer.ema.average[BOOK][kept], average[kept])
    if means is not None:
        assert bool((means.counts[0, rows] == 1).all())
        torch.testing.assert_close(means.sums[0, rows], weight.detach()[rows])


@pytest.mark.parametrize("changes", [{"codebook": {"start": "data"}}, MEANS], ids=["gradient", "means"])
def test_revived_codes_begin_anew(stage_1, changes):
    check_revival(stage1.AutoencoderTrainer._revive, stage_1(**VQ, **changes))
    bugs = {
        "moments": ("moment[rows] = 0.0", "pass"),
        "average": ("self.ema.average[EMBEDDING][rows] = weight.detach()[rows]", "pass"),
        "means": ("self.codebook_ema.restart(vae, rows)", "pass"),
    }
    for name in ("means" if changes is MEANS else "moments", "average"):
        with pytest.raises(AssertionError):
            check_revival(planted(stage1.AutoencoderTrainer._revive, bugs[name]), stage_1(**VQ, **changes))


# Whole runs


@pytest.mark.parametrize("kind", [VQ, RESIDUAL, GRID], ids=["vq", "residual", "grid"])
def test_a_run_goes_on_to_the_bit_and_reports_its_codes(tmp_path, stripe_folder, kind):
    changes = {**kind, **({} if kind is GRID else MEANS), "data__flips": True}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(autoencoder_config(stripe_folder, whole, **changes, train__steps=8))
    train(autoencoder_config(stripe_folder, broken, **changes, train__steps=5))
    train(autoencoder_config(stripe_folder, broken, **changes, train__steps=8), resume=True)
    first, second = (state.load_state(folder)[0] for folder in (whole, broken))
    assert {name: set(group) for name, group in first.items()} == {name: set(group) for name, group in second.items()}
    for name, group in first.items():
        assert all(torch.equal(value, second[name][key]) for key, value in group.items()), name
    assert ("mean_sums" in first["codes"]) == (kind is not GRID)

    # The report counts what the published autoencoder chooses, and the picture has a tile for each code
    codec = LatentCodec(load_autoencoder(str(whole)))
    images = Images(autoencoder_config(stripe_folder, whole, **changes).data, codec.factor)
    held_out = images.held_out.batch(torch.arange(len(images.held_out)))[0]
    used = [len(codes.unique()) for codes in codec.codes(held_out).unbind(1)]
    report = json.loads((whole / "report.json").read_text())["codes"]
    assert report["levels"] == len(used) and report["dead"] == len(used) * report["codes"] - sum(used)
    assert report["used"] == pytest.approx(sum(used) / len(used) / report["codes"])
    assert report["bits_per_image"] == pytest.approx(64 * len(used) * np.log2(report["codes"]))
    assert 1 <= report["perplexity"] <= max(used)
    lines = [line for line in json.loads((whole / "report.json").read_text())["lines"] if "codes" in line]
    assert len(lines) == 1 and f"{report['used']:.0%} of {report['codes']} codes" in lines[0]
    assert np.asarray(Image.open(whole / "codebook.png")).shape[1] >= 8 * np.sqrt(report["codes"])


def test_the_picture_shows_each_code_from_dark_to_light():
    codec = LatentCodec(load_autoencoder_of(GRID))
    picture = np.asarray(codebook_picture(codec)).astype(float)
    tile = 9  # of 8 x 8 pixels, with a line
    assert picture.shape == (8 * tile, 8 * tile)  # 60 codes in 8 rows of 8
    grey = [picture[r * tile : r * tile + 8, c * tile : c * tile + 8].mean() for r in range(8) for c in range(8)]
    assert grey[:60] == sorted(grey[:60]) and grey[0] < grey[59] and grey[60:] == [255] * 4


def load_autoencoder_of(kind):
    config = autoencoder_config("data", "run", **kind)
    torch.manual_seed(0)
    return stage1.make_autoencoder(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**GRID, **MEANS}, "codebook: is for a VQModel or ResidualVQModel .* FSQModel has none to train; leave it out"),
        (MEANS, "AutoencoderKL has none to train"),
        ({**VQ, "codebook": {"decay": 0.9}}, "codebook.decay: is of the running means; set codebook.update=ema"),
        ({"model": {"type": "VQ"}}, "model.type: 'VQ' is not one of AutoencoderKL, VQModel, ResidualVQModel, FSQModel"),
    ],
)
def test_a_codebook_that_cannot_be_trained_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        load_autoencoder_of(changes)


# A codebook for the latents of a trained AutoencoderKL


def check_kept(made_by, start, images):
    """With a codebook of all the latents of the images, they are rebuilt as the AutoencoderKL rebuilds them from the means."""
    kl = load_autoencoder(str(start))
    with torch.no_grad():
        latents = kl.encode(images).latent_dist.mean
        positions = latents.movedim(1, -1).flatten(0, -2)
        vae = made_by(kl, "VQModel", {"num_vq_embeddings": len(positions)})
        vae.quantize.embedding.weight.copy_(positions)
        torch.testing.assert_close(vae.encode(images).latents, latents, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(vae(images).sample, kl.decode(latents).sample, rtol=1e-3, atol=1e-3)


def test_codes_of_a_trained_autoencoder_keep_its_means_and_its_decoder(autoencoder_run, stripe_folder):
    data = autoencoder_config(stripe_folder, "run").data
    images = Images(data, 2).train.batch(torch.arange(3))[0]
    check_kept(with_codes, autoencoder_run, images)
    for bug in (
        ('["quant_conv.weight"][:c,', '["quant_conv.weight"][c:,'),  # the half of the log-variances
        ("means @ bias + moved", "means @ bias"),
    ):
        with pytest.raises(AssertionError):
            check_kept(planted(with_codes, bug), autoencoder_run, images)


@pytest.mark.parametrize("kind", ["ResidualVQModel", "FSQModel"])
def test_a_run_begins_with_a_trained_autoencoder_and_codes_of_its_latents(
    stage_1, tmp_path, stripe_folder, autoencoder_run, kind
):
    config = {"fsq_levels": [9, 9]} if kind == "FSQModel" else {"num_vq_embeddings": 64, "num_quantizers": 2}
    model = {"type": kind, "config": config, "pretrained": str(autoencoder_run)}
    trainer = stage_1(model=model, **({} if kind == "FSQModel" else MEANS))
    images, kl = first_images(trainer), load_autoencoder(str(autoencoder_run))
    with torch.no_grad():
        error = (trainer.model.vae(images).sample - images).square().mean()
        own = (kl.decode(kl.encode(images).latent_dist.mean).sample - images).square().mean()
    assert type(trainer.model.vae).__name__ == kind
    if kind != "FSQModel":  # whose latents are squashed at first
        assert error < 1.5 * own + 1e-3
    train(autoencoder_config(stripe_folder, tmp_path / "run", model=model, **({} if kind == "FSQModel" else MEANS)))
    assert type(load_autoencoder(str(tmp_path / "run"))).__name__ == kind


@pytest.mark.parametrize(
    ("type_name", "config", "changes", "message"),
    [
        (
            "VQModel",
            {"num_vq_embeddings": 8, "block_out_channels": [8, 16]},
            MEANS,
            r"\w+.conv\w+.weight has the shape .* leave out",
        ),
        ("VQModel", {"num_vq_embeddings": 8, "vq_embed_dim": 3}, MEANS, "vq_embed_dim: has 3 channels; model.pretrained has 2"),
        ("FSQModel", {"fsq_levels": [5, 4, 3]}, {}, "model.config.fsq_levels: has 3 channels; model.pretrained has 2"),
        ("VQModel", {"num_vq_embeddings": 8, "layers_per_block": 2}, MEANS, "layers_per_block"),
        ("VQModel", {"num_vq_embeddings": 8}, {}, "codebook.start: model.pretrained .* has no codebook, so set it to data"),
        ("VQModel", {"num_vq_embeddings": 8}, {**MEANS, "freeze_encoder": True}, "leave freeze_encoder out"),
    ],
)
def test_codes_that_do_not_go_with_the_trained_autoencoder_are_refused(autoencoder_run, type_name, config, changes, message):
    model = {"type": type_name, "config": config, "pretrained": str(autoencoder_run)}
    with pytest.raises(UserError, match=message) as refused:
        load_autoencoder_of({"model": model, **changes})
    assert "\n" not in str(refused.value)


# Both stages


@pytest.mark.parametrize("kind", [VQ, RESIDUAL], ids=["vq", "residual"])
def test_from_images_through_codes_and_diffusion_to_images(tmp_path, stripe_folder, kind):
    """Latents before quantisation are diffused, and quantised as they are decoded (LDM, arXiv 2112.10752, section 3.1)."""
    first = train(autoencoder_config(stripe_folder, tmp_path / "first", **kind, **MEANS, train__steps=6))
    model = train(diffusion_config(stripe_folder, tmp_path / "second", tmp_path / "first", train__steps=3))
    pipe = latentdiff.LatentDiffusionPipeline.from_pretrained(model)
    plain = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
    calls = []
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        call = {"class_labels": [0, 1], "num_inference_steps": 2, "generator": generator}
        calls.append(each(**call, output_type="np").images)
    assert np.allclose(calls[0], calls[1], atol=1e-5) and calls[0].std() > 0
    latents = pipe(**{**call, "generator": torch.Generator().manual_seed(0)}, output_type="latent").images
    codec = LatentCodec(pipe.vae)
    codes = codes_of(codec.vae, codec.denormalise(latents))
    decoded = codec.decode_codes(codes).clamp(-1, 1) / 2 + 0.5
    assert np.allclose(calls[0], decoded.movedim(1, -1).numpy(), atol=1e-3)  # what is shown is quantised
    # latentdiff runs its own code for the autoencoder, never the folder's
    if kind is RESIDUAL:
        (model / "vae" / "vq_models.py").write_text("raise SystemExit('run')\n")
        latentdiff.LatentDiffusionPipeline.from_pretrained(model)
    main(["generate", "down", "--model", str(model), "--num-images", "2", "--steps", "2", "--out", str(tmp_path / "drawn.png")])
    assert np.asarray(Image.open(tmp_path / "drawn.png")).std() > 0
    # Latents have a density, the pixels behind them have none: one line says so
    name = type(load_autoencoder(str(first))).__name__
    with pytest.raises(UserError, match=f"likelihood: {name} has no posterior") as refusal:
        measure_likelihood(model, str(stripe_folder), num_images=2)
    assert "\n" not in str(refusal.value)
