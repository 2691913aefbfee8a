"""What a training step is made of: its noises, its loss, its averages and its conditions; each with the bug it would find.

Every check is run on the code as it stands, and once more on a twin with one line changed, where it must fail.
"""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from planted import planted
from tiny_runs import autoencoder_config, diffusion_config
from tiny_text import text_tree, write_captioned

from latentdiff.config import ConditionConfig, parse_config
from latentdiff.data.captions import Captions
from latentdiff.errors import UserError
from latentdiff.models.text_encoder import NULL_PROMPT, ClassCondition
from latentdiff.objective import add_noise
from latentdiff.training import conditioning, state, train
from latentdiff.training import train_autoencoder as stage1
from latentdiff.training import train_diffusion as stage2
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.conditioning import Conditions, TextCondition
from latentdiff.training.images import Images

MIN_SNR = {"prediction": "v_prediction", "weighting": "min_snr", "min_snr_gamma": 0.5}
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("latents") / "cache")


@pytest.fixture
def stage_2(stripe_folder, autoencoder_run, cache, tmp_path):
    """stage_2(**changes) -> the trainer of a stage-2 run before its first step."""

    def build(**changes):
        config = diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, cache__folder=cache, **changes)
        accelerator = start_accelerator(config.train)
        with stage2.progress_bar("encoding", False, lambda: None) as progress:
            latents = stage2.prepare_latents(config, accelerator, progress)
        torch.manual_seed(0)
        conditions = conditioning.prepare_conditions(config, latents, accelerator)
        trainer = stage2.DiffusionTrainer(config, latents, conditions, accelerator)
        trainer.prepare_validation()
        return trainer

    return build


@pytest.fixture
def stage_1(stripe_folder, tmp_path):
    """stage_1(**changes) -> the trainer of a stage-1 run before its first step."""

    def build(**changes):
        config = autoencoder_config(stripe_folder, tmp_path / "run", **changes)
        torch.manual_seed(0)
        vae = stage1.make_autoencoder(config)
        images = Images(config.data, stage1.LatentCodec(vae).factor)
        return stage1.AutoencoderTrainer(config, vae, images, start_accelerator(config.train))

    return build


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def five_errors(count: int) -> float:
    """Five standard errors of the correlation of `count` independent pairs."""
    return 5 / math.sqrt(count)


# Stage 2: noise and validation


def check_two_noises(draw_batch, trainer):
    batch = draw_batch(trainer, 3)
    mean, std = trainer.latents.cache.moments(trainer.image_indices(3), False)
    posterior = (trainer.latents.codec.denormalise(batch.x0) - mean) / std
    assert abs(float(posterior.std()) - 1) < five_errors(posterior.numel())
    assert abs(correlation(posterior, batch.noise)) < five_errors(posterior.numel())


def test_the_posterior_has_a_noise_of_its_own(stage_2):
    trainer = stage_2(train__batch_size=32)
    check_two_noises(stage2.DiffusionTrainer.draw_batch, trainer)
    one = "posterior_noise = noise = randn(shape, generator)[mine]"
    both = "posterior_noise, noise = randn(shape, generator)[mine], randn(shape, generator)[mine]"
    with pytest.raises(AssertionError):
        check_two_noises(planted(stage2.DiffusionTrainer.draw_batch, (both, one)), trainer)


def check_validation_set(make, trainer, draws):
    """What is validated on are posterior draws (or means) of the held-out images."""
    images, _ = trainer.latents.images.held_out_batch(trainer.config.validation_images)
    mean, std = trainer.latents.codec.moments(images)
    held = make(trainer)
    noise = (trainer.latents.codec.denormalise(held["x0"]) - mean) / std
    spread, count = float(noise.square().mean().sqrt()), noise.numel()
    assert len(images) == 12 and abs(spread - draws) < (five_errors(count) if draws else 1e-4)
    assert abs(correlation(noise, held["noise"])) < five_errors(count) or not draws
    assert torch.equal(held["x0"], make(trainer)["x0"])


def test_validation_is_on_draws_of_held_out_images(stage_2):
    trainer = stage_2()
    config, validation_set = trainer.config, stage2.DiffusionTrainer.validation_set
    check_validation_set(validation_set, trainer, 1)
    trainer.config = config.model_copy(update={"cache": config.cache.model_copy(update={"use_mean": True})})
    check_validation_set(validation_set, trainer, 0)
    trainer.config = config
    for bug in (
        ("images.held_out_batch(config.validation_images)", "images.train.batch(torch.arange(12))"),
        ("posterior, config.cache.use_mean", "posterior, True"),
    ):
        with pytest.raises(AssertionError):
            check_validation_set(planted(validation_set, bug), trainer, 1)


def check_validation_loss(trainer):
    """By the formula of the config: min(SNR, 0.5) / (SNR + 1) of v's squared error, importance-sampled times corrected."""
    held, schedule = trainer.validation, trainer.schedule
    found = trainer.validate()
    for name, weights in (("raw", trainer.model.state_dict()), ("ema", trainer.ema.state())):
        trainer.ema_model.load_state_dict(weights)
        x_t = add_noise(schedule, held["x0"], held["noise"], held["t"])
        steps = (held["t"] * 1000 - 1).round()
        with torch.no_grad():
            v = trainer.ema_model(x_t, steps.float(), class_labels=held["class_labels"]).sample
        alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in (schedule.alpha(held["t"]), schedule.sigma(held["t"])))
        error = (v - (alpha * held["noise"] - sigma * held["x0"])).square().flatten(1).mean(1)
        snr = (schedule.alpha(held["t"]) / schedule.sigma(held["t"])) ** 2
        loss = error * snr.clamp(max=0.5) / (snr + 1) * trainer.levels.correction(held["t"])
        assert found[f"validation/loss_{name}"] == pytest.approx(float(loss.mean()), rel=1e-4)
        assert found[f"validation/error_{name}"] == pytest.approx(float(error.mean()), rel=1e-4)


def test_the_validation_loss_is_the_one_minimised(stage_2):
    trainer = stage_2(**MIN_SNR, noise_levels="importance")
    # Whole timesteps, which are what the network is fed
    trainer.levels.midpoints = lambda n: torch.linspace(100, 900, n, dtype=torch.float64).round() / 1000
    trainer.validation = trainer.validation_set()
    trainer.train_step(0, 1e-2)  # raw and averaged weights are no longer the same
    check_validation_loss(trainer)
    for bug in (
        (" * weight.to(error)", ""),
        (" * self.levels.correction(t).to(error)", ""),
        (", config.min_snr_gamma", ""),
    ):
        trainer.weighted_loss = partial(planted(stage2.DiffusionTrainer.weighted_loss, bug), trainer)
        with pytest.raises(AssertionError):
            check_validation_loss(trainer)


def test_the_plain_error_is_logged_only_where_it_is_another_number(stage_2):
    for changes, names in (({}, {"loss"}), ({"noise_levels": "importance"}, {"loss", "error"})):
        found = stage_2(**changes).validate()
        assert {key.removeprefix("validation/").split("_")[0] for key in found} == names
    trainer = stage_2(weighting="uncertainty")
    trainer.uncertainty.weight.data.fill_(0.2)
    found = trainer.validate()
    u = trainer.uncertainty.log_variance(trainer.validation["t"]).detach()
    assert found["validation/loss_raw"] != pytest.approx(found["validation/error_raw"], rel=1e-2)
    trainer.uncertainty.weight.data.zero_()
    plain = trainer.validate()
    assert plain["validation/loss_raw"] == pytest.approx(plain["validation/error_raw"], rel=1e-5)
    assert float(u.abs().max()) > 0.1


def test_the_best_value_of_another_definition_is_not_kept(stripe_folder, autoencoder_run, cache, tmp_path, capsys, monkeypatch):
    changes = {"cache__folder": cache, "train__best": "validation/loss_ema", "train__picture_every": 2}
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes, train__steps=2))
    load = state.load_state

    def older(output, **options):
        tensors, meta = load(output, **options)
        return tensors, {**{key: value for key, value in meta.items() if key != "validation"}, "best": -1.0}

    monkeypatch.setattr(state, "load_state", older)
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes, train__steps=4), resume=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "train.best begins anew" in line]
    assert len(said) == 1 and said[0].startswith("warning: validation/loss_ema was computed otherwise")
    monkeypatch.undo()
    assert state.load_state(tmp_path / "run")[1]["best"] > 0


# Stage 2: a step


def check_gamma(train_step, trainer):
    batch, schedule = trainer.draw_batch(0), trainer.schedule
    with torch.no_grad():
        x_t = add_noise(schedule, batch.x0, batch.noise, batch.t)
        v = trainer.denoiser.output(x_t, batch.t, **batch.conditioning)
    alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in (schedule.alpha(batch.t), schedule.sigma(batch.t)))
    error = (v - (alpha * batch.noise - sigma * batch.x0)).square().flatten(1).mean(1)
    snr = (schedule.alpha(batch.t) / schedule.sigma(batch.t)) ** 2
    expected = float((error * snr.clamp(max=0.5) / (snr + 1)).mean())
    values, good = train_step(trainer, 0, 0.0)
    assert good and float(values["loss"][0]) == pytest.approx(expected, rel=1e-4)


def test_min_snr_gamma_reaches_the_step(stage_2):
    trainer, train_step = stage_2(**MIN_SNR), stage2.DiffusionTrainer.train_step
    check_gamma(train_step, trainer)
    with pytest.raises(AssertionError):
        check_gamma(planted(train_step, ("config.weighting, config.min_snr_gamma)", "config.weighting)")), trainer)


def check_average(train_step, trainer):
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    train_step(trainer, 0, 1e-2)
    after, rate = trainer.model.state_dict(), 1 - trainer.ema.decay_at(1)
    assert max(float((after[key] - before[key]).abs().max()) for key in before) > 5e-3
    for key, value in trainer.ema.state().items():
        torch.testing.assert_close(value, torch.lerp(before[key], after[key], rate), rtol=1e-5, atol=1e-6)


def test_the_average_is_of_the_weights_after_the_step(stage_2):
    train_step = stage2.DiffusionTrainer.train_step
    check_average(train_step, stage_2())
    step, scale, average = "self.optimizer.step()", "self.loss_scale.stepped()", "self.ema.update(self.model)"
    right, wrong = ("\n        ".join(order) + "\n" for order in ((step, scale, average), (average, step, scale)))
    with pytest.raises(AssertionError):
        check_average(planted(train_step, (right, wrong)), stage_2())


# Stage 2: conditions


def class_and_text(joint: float, dropout: float = 0.5) -> Conditions:
    captions = Captions([("zero",), ("one",), ("two",)])
    table = {"input_ids": torch.arange(len(captions.distinct))[:, None]}  # the row is the token; row 0 is the empty prompt
    labels, prompts = torch.tensor([2, 0, 1]), SimpleNamespace(encoder=None, tokenizer=None)
    return Conditions(ClassCondition(3, dropout, joint), labels, TextCondition(captions, dropout, prompts, table), joint)


def check_drops(call):
    """Four samples: neither, the class, the caption, both by their own draws; then the joint draw alone."""
    told, indices = class_and_text(joint=0.5), torch.tensor([0, 1, 2, 0, 1])
    assert told.text.captions.distinct == [NULL_PROMPT, "one", "two", "zero"]
    low, high = 0.1, 0.9
    draws = {
        "class": torch.tensor([high, low, high, low, high]),
        "caption": torch.zeros(5),
        "text": torch.tensor([high, high, low, low, high]),
        "joint": torch.tensor([high, high, high, high, low]),
    }
    given = call(told, indices, draws, "cpu")
    assert given["class_labels"].tolist() == [2, 3, 1, 3, 3]
    assert given["input_ids"][:, 0].tolist() == [3, 1, 0, 0, 0]


def test_class_and_text_are_dropped_by_draws_of_their_own_and_together():
    check_drops(Conditions.__call__)
    for bug in (
        ('draws["text"] < self.text.dropout', 'draws["class"] < self.text.dropout'),
        ('(draws["text"] < self.text.dropout) | both', 'draws["text"] < self.text.dropout'),
        ('(draws["class"] < self.classes.dropout) | both', 'draws["class"] < self.classes.dropout'),
    ):
        with pytest.raises(AssertionError):
            check_drops(planted(Conditions.__call__, bug))


def test_how_often_each_condition_is_dropped():
    """P(both) = j + (1 - j) c d, P(no class) = j + (1 - j) c: within five standard errors of 40,000 samples."""
    n, joint, alone = 40_000, 0.1, 0.1
    told = class_and_text(joint, alone)
    draws = told.draw(n, torch.Generator().manual_seed(0))
    given = told(torch.zeros(n, dtype=torch.int64), draws, "cpu")
    no_class, no_text = given["class_labels"] == 3, given["input_ids"][:, 0] == 0
    for share, expected in (
        (no_class, joint + (1 - joint) * alone),
        (no_text, joint + (1 - joint) * alone),
        (no_class & no_text, joint + (1 - joint) * alone**2),
    ):
        assert abs(float(share.double().mean()) - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    before = class_and_text(0.0, alone).draw(n, torch.Generator().manual_seed(0))
    assert set(before) == {"class", "caption", "text"} and all(torch.equal(before[key], draws[key]) for key in before)


def test_the_joint_dropout_that_a_config_means():
    def share(kind, dropout=0.1, text=0.1, **given):
        condition = ConditionConfig(type=kind, dropout=dropout, text={"dropout": text}, **given)
        return condition.effective_joint_dropout

    assert share("class+text") == 0.1 and share("class") == share("text") == 0
    assert share("class+text", dropout=0) == share("class+text", text=0) == 0  # no null class, or no null prompt
    assert share("class+text", dropout=0, text=0, joint_dropout=0.2) == 0.2
    assert ClassCondition(3, 0, 0.2).null_class == 3 and ClassCondition(3, 0).null_class is None


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"type": "class", "joint_dropout": 0.1}, "condition.joint_dropout: condition.type is class, .* class.text$"),
        ({"type": "class+text", "joint_dropout": 1}, "condition.joint_dropout: 1 drops every class and caption"),
        ({"type": "class+text", "joint_dropout": 1.5}, "condition.joint_dropout"),
    ],
)
def test_a_joint_dropout_that_cannot_be_is_refused(stripe_folder, autoencoder_run, tmp_path, condition, said):
    with pytest.raises(UserError, match=said):
        conditioning.check(parse_config(text_tree(stripe_folder, tmp_path / "run", autoencoder_run, condition=condition)))


def test_a_run_from_before_the_joint_dropout_is_resumed_without_it(tmp_path):
    data = write_captioned(tmp_path / "data")
    first_stage = train(autoencoder_config(data, tmp_path / "autoencoder", train__steps=2))

    def run(name, steps, resume=False, **changes):
        both = {"condition__type": "class+text", "cache__folder": str(tmp_path / "latents"), "train__steps": steps}
        train(parse_config(text_tree(data, tmp_path / name, first_stage, **both, **changes)), resume=resume)
        return state.load_state(tmp_path / name)[0]["model"], tmp_path / name / "run.json"

    _, record = run("old", 2, condition__joint_dropout=0.0)
    shutil.copytree(tmp_path / "old", tmp_path / "whole")  # with its tokenizer, which would be another if learnt anew
    whole, _ = run("whole", 4, resume=True, condition__joint_dropout=0.0)
    tree = json.loads(record.read_text())
    del tree["condition"]["joint_dropout"]
    record.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="condition.joint_dropout differs from the config given"):
        run("old", 3, resume=True, condition__joint_dropout=0.1)
    run("old", 3, resume=True)
    assert json.loads(record.read_text())["condition"]["joint_dropout"] == 0
    resumed, _ = run("old", 4, resume=True)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    _, record = run("new", 1)
    assert json.loads(record.read_text())["condition"]["joint_dropout"] is None


# Stage 1


def check_posterior_noise(draw_noise, trainer):
    x = trainer.images.train.batch(torch.arange(8))[0]
    first, second = (draw_noise(trainer, x, step)[0] for step in (0, 1))
    assert abs(correlation(first, second)) < five_errors(first.numel())
    assert torch.equal(first, draw_noise(trainer, x, 0)[0])


def test_stage_1_draws_its_posteriors_anew_at_every_step(stage_1):
    trainer, draw_noise = stage_1(), stage1.AutoencoderTrainer.draw_noise
    check_posterior_noise(draw_noise, trainer)
    with pytest.raises(AssertionError):
        check_posterior_noise(planted(draw_noise, ('"posterior", step', '"posterior"')), trainer)


def check_commitment(loss_terms, trainer):
    """VQ-VAE (1711.00937) eq. 3: the codebook's term has weight 1, commitment 0.25; values, sum and gradients."""
    x = trainer.images.train.batch(torch.arange(8))[0]
    out = trainer.model(x, None)
    found = loss_terms(trainer, x, out, 0, None)
    z, codebook = out["latents"], trainer.model.vae.quantize.embedding.weight
    chosen = out["codes"].view(len(z), *z.shape[2:])
    e = codebook[chosen].movedim(-1, 1)
    distance = (z - e).square().mean()
    assert float(found["commitment"].detach()) == pytest.approx(1.25 * float(distance.detach()), rel=1e-5)
    total = sum(float(found[name].detach()) for name in ("l1", "l2", "commitment"))  # whose weights are 1 in this config
    assert float(found["total"].detach()) == pytest.approx(total, rel=1e-5)
    of_z, of_codebook = torch.autograd.grad(found["commitment"], (z, codebook), retain_graph=True)
    pull = 2 * (z - e).detach() / z.numel()
    torch.testing.assert_close(of_z, 0.25 * pull)
    moved = torch.zeros_like(codebook).index_add(0, out["codes"], -pull.movedim(1, -1).reshape(-1, codebook.shape[1]))
    torch.testing.assert_close(of_codebook, moved)
    # And the whole loss reaches the codebook by that term alone
    (whole,) = torch.autograd.grad(found["total"], codebook)
    torch.testing.assert_close(whole, moved)


def test_the_commitment_has_the_weights_of_the_paper(stage_1):
    trainer, loss_terms = stage_1(**VQ), stage1.AutoencoderTrainer.loss_terms
    check_commitment(loss_terms, trainer)
    tenth = ('commitment=output.get("commitment")', 'commitment=0.1 * output["commitment"]')
    with pytest.raises(AssertionError):
        check_commitment(planted(loss_terms, tenth), trainer)
    trainer.model.vae.quantize.legacy = True
    with pytest.raises(AssertionError):
        check_commitment(loss_terms, trainer)


def check_usage(folder, data, curves):
    """An epoch is 36 images in batches of 8: steps 1 to 4, 5 to 8; a step has 8 images of 64 codes."""
    train(autoencoder_config(data, folder, **VQ, train__steps=5))
    assert int(state.load_state(folder)[0]["codes"]["counts"].sum()) == 8 * 64
    assert len(curves(folder)["codes/used"]) == 1


def test_code_usage_begins_anew_with_each_epoch(tmp_path, stripe_folder, curves, monkeypatch):
    check_usage(tmp_path / "right", stripe_folder, curves)
    after_step = planted(stage1.AutoencoderTrainer.after_step, ("self.code_usage.reset()", "pass"))
    monkeypatch.setattr(stage1.AutoencoderTrainer, "after_step", after_step)
    with pytest.raises(AssertionError):
        check_usage(tmp_path / "wrong", stripe_folder, curves)
