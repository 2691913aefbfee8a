"""Stage 2 on every schedule by config: a short run learns, is published and samples; weightings and noise levels with it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import diffusion_config

from latentdiff import checkpoints, prediction
from latentdiff.config import parse_config
from latentdiff.errors import UserError
from latentdiff.noise_levels import make_noise_levels
from latentdiff.objective import loss_weight
from latentdiff.schedules import make_schedule
from latentdiff.training import state, train
from latentdiff.training import train_diffusion as stage2
from latentdiff.training.accelerator import start_accelerator

NO_TWIN = {"sample__scheduler": None, "sample__sampler": "dpmpp_2m"}
RUNS = {
    "vp": {"schedule": "vp", "weighting": "likelihood", "noise_levels": "importance"},
    "subvp": {"schedule": "subvp", **NO_TWIN},
    "ve": {"schedule": {"name": "ve", "params": {"sigma_min": 0.02, "sigma_max": 20.0}}, "noise_levels": "stratified"},
    # Its target is 5,000 times as large at one end as at the other: it takes longer to learn
    "ve score": {
        "schedule": "ve",
        "prediction": "score",
        "weighting": "likelihood",
        "optimizer__lr": 2e-3,
        "train__steps": 60,
        **NO_TWIN,
    },
    "cosine": {"schedule": "cosine", "prediction": "v_prediction", "weighting": "edm", "sample__scheduler": "DDIMScheduler"},
    "flow": {
        "schedule": "flow",
        "prediction": "flow",
        "noise_levels": "logit_normal",
        "sample__scheduler": "DPMSolverMultistepScheduler",
        "sample__scheduler_config": {"flow_shift": 1.5},
    },
    "edm": {"schedule": "edm", "prediction": "edm", "weighting": "uncertainty", "noise_levels": "log_normal"},
    "zero snr": {
        "schedule": {"name": "ddpm-linear", "params": {"zero_terminal_snr": True}},
        "prediction": "sample",
        "noise_levels": {"name": "logit_normal", "params": {"mean": -1.5, "stratified": True}},
        "sample__scheduler": "EulerDiscreteScheduler",
    },
}
SCHEDULERS = {
    "vp": "DPMSolverMultistepScheduler",
    "subvp": "NoneType",
    "ve": "NoneType",
    "ve score": "NoneType",
    "cosine": "DDIMScheduler",
    "flow": "DPMSolverMultistepScheduler",
    "edm": "EDMEulerScheduler",
    "zero snr": "EulerDiscreteScheduler",
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return str(tmp_path_factory.mktemp("latents") / "cache")  # one for all


def trivial(config, held) -> float:
    """The validation loss of a network that always answers 0, on the run's own latents, noise and times."""
    schedule = make_schedule(config.schedule.name, **config.schedule.params)
    levels = make_noise_levels(config.noise_levels.name, schedule, **config.noise_levels.params)
    target = prediction.target(config.prediction, schedule, held["x0"], held["noise"], held["t"])
    weight = loss_weight(config.weighting, config.prediction, schedule, held["t"]) * levels.correction(held["t"])
    return float((target.square().flatten(1).mean(1) * weight).mean())


@pytest.mark.parametrize("name", RUNS)
def test_every_schedule_trains_is_published_and_samples(
    tmp_path, stripe_folder, autoencoder_run, latents, curves, monkeypatch, name
):
    validation_set, held = stage2.DiffusionTrainer.validation_set, {}
    monkeypatch.setattr(stage2.DiffusionTrainer, "validation_set", lambda self: held.setdefault("set", validation_set(self)))
    config = diffusion_config(
        stripe_folder,
        tmp_path / "run",
        autoencoder_run,
        **{"train__steps": 30, **RUNS[name]},
        cache__folder=latents,
        train__batch_size=16,
    )
    model = train(config)
    logged = curves(tmp_path / "run")
    assert all(np.isfinite(logged["train/loss"])) and len(logged["train/loss"]) == config.train.steps
    assert np.isfinite(logged["train/gradient_norm"]).all()
    # Both are of the same latents, noise and times, so nothing but learning tells them apart
    assert logged["validation/loss_raw"][-1] < 0.99 * trivial(config, held["set"])
    pipeline = checkpoints.load(model)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == SCHEDULERS[name]
    assert pipeline.config.default_sampler == (None if pipeline.scheduler is not None else "dpmpp_2m")
    for sampler in (None, "heun"):
        images = pipeline(
            class_labels=[0, "blank"],
            sampler=sampler,
            num_inference_steps=4,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        assert images.shape == (2, 16, 16, 1) and np.isfinite(images).all() and images.std() > 0
    assert (tmp_path / "run" / "pictures" / f"step-{config.train.steps:06d}.png").is_file()


def run(folder, data, autoencoder, **changes):
    train(diffusion_config(data, folder, autoencoder, **changes))
    return folder


def test_learned_uncertainty_is_saved_resumed_and_not_published(tmp_path, stripe_folder, autoencoder_run, latents, curves):
    changes = {"weighting": "uncertainty", "cache__folder": latents, "optimizer__weight_decay": 0.1}
    whole = run(tmp_path / "whole", stripe_folder, autoencoder_run, **changes, train__steps=6)
    broken = run(tmp_path / "broken", stripe_folder, autoencoder_run, **changes, train__steps=3)
    train(diffusion_config(stripe_folder, broken, autoencoder_run, **changes, train__steps=6), resume=True)
    first, second = (state.load_state(folder)[0] for folder in (whole, broken))
    assert float(first["uncertainty"]["weight"].abs().min()) > 0
    for group in ("uncertainty", "model", "optimizer"):
        assert all(torch.equal(value, second[group][key]) for key, value in first[group].items()), group
    assert curves(whole)["train/loss"] == curves(broken)["train/loss"]
    keys = set(checkpoints.load(whole / "model").unet.state_dict())
    assert keys == set(first["model"])
    plain = run(tmp_path / "plain", stripe_folder, autoencoder_run, cache__folder=latents, train__steps=1)
    assert "uncertainty" not in state.load_state(plain)[0]
    # u starts at 0: the first loss is the plain one, and then the weight moves
    assert curves(whole)["train/loss"][0] == curves(plain)["train/loss"][0]


@pytest.mark.parametrize("weighting", ["none", "uncertainty"])
def test_importance_sampling_reaches_the_step_with_its_correction(
    tmp_path, stripe_folder, autoencoder_run, latents, monkeypatch, curves, weighting
):
    seen = []
    real = stage2.weighted_error

    def spy(denoiser, output, x0, noise, t, *args):
        loss = real(denoiser, output, x0, noise, t, *args)
        if torch.is_grad_enabled():
            seen.append((t, loss.detach()))
        return loss

    monkeypatch.setattr(stage2, "weighted_error", spy)
    folder = run(
        tmp_path / "run",
        stripe_folder,
        autoencoder_run,
        schedule="flow",
        prediction="flow",
        weighting=weighting,
        noise_levels="importance",
        cache__folder=latents,
        train__steps=1,
    )
    ((t, loss),) = seen
    s = make_schedule("flow")
    span = float(s.log_snr(s.t_min) - s.log_snr(s.t_max))
    density = 2 / (t * (1 - t) * span)  # g^2/sigma^2 = 2/(t (1 - t)) on the straight path, over its integral
    expected = float((loss / (density * (s.t_max - s.t_min))).mean())
    assert curves(folder)["train/loss"][0] == pytest.approx(expected, rel=1e-5)


def test_strata_are_of_the_global_batch_whatever_the_number_of_processes(
    tmp_path, stripe_folder, autoencoder_run, latents, monkeypatch
):
    """Each of N processes takes its rows of one draw for the whole batch, so that together they are the strata."""
    config = diffusion_config(
        stripe_folder, tmp_path, autoencoder_run, noise_levels="stratified", train__batch_size=8, cache__folder=latents
    )
    drawn = []

    class Stop(Exception):
        pass

    def spy(denoiser, output, x0, noise, t, *args):
        drawn.append(t)
        raise Stop

    monkeypatch.setattr(stage2, "weighted_error", spy)
    accelerator = start_accelerator(config.train)
    with stage2.progress_bar("encoding", False, lambda: None) as progress:
        held = stage2.prepare_latents(config, accelerator, progress)
        conditions = stage2.conditioning.prepare_conditions(config, held, accelerator, progress)
    trainer = stage2.DiffusionTrainer(config, held, conditions, accelerator)
    shares = [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    for count, index in shares:
        trainer.accelerator = SimpleNamespace(device=accelerator.device, num_processes=count, process_index=index)
        with pytest.raises(Stop):
            trainer.train_step(5, 1e-3)
    assert torch.equal(torch.cat(drawn[1:3]), drawn[0]) and torch.equal(torch.cat(drawn[3:]), drawn[0])
    place = ((drawn[0].sort().values - trainer.schedule.t_min) / (trainer.schedule.t_max - trainer.schedule.t_min) * 8).long()
    assert place.tolist() == list(range(8))


def refusal(data, folder, autoencoder, **changes) -> str:
    with pytest.raises(UserError) as error:
        train(diffusion_config(data, folder / "run", autoencoder, **changes))
    assert "\n" not in str(error.value) and not (folder / "run").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "ve", "sample__scheduler": "DDIMScheduler"}, "VE has no equal among diffusers' schedulers"),
        ({"schedule": "subvp", "sample__scheduler": "DDIMScheduler"}, "sample.scheduler=null"),
        ({"schedule": "ve", "sample__sampler": "dpmpp"}, "sample.sampler: 'dpmpp' is unknown; valid: ancestral"),
        ({"schedule": "ve", "sample__scheduler_config": {"shift": 1}}, "sample.scheduler_config"),
        ({"schedule": "edm"}, "EDMEulerScheduler with prediction epsilon is not possible for EDM"),
        ({"schedule": {"name": "vp", "params": {"beta": 1}}}, "beta_min, beta_max"),
        ({"sample__scheduler_config": {"spacing": "x"}}, "DPMSolverMultistepScheduler refuses its config"),
        ({"noise_levels": {"name": "log_normal", "params": {"std": -1}}}, "std must be above 0"),
        ({"weighting": "snr"}, "'none', 'min_snr', 'edm', 'likelihood' or 'uncertainty'"),
        ({"schedule": 3}, "schedule"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, stripe_folder, autoencoder_run, changes, said):
    assert said in refusal(stripe_folder, tmp_path, autoencoder_run, **changes)


def test_a_name_alone_is_the_name_without_parameters():
    a, b = (
        parse_config(
            {
                "stage": "diffusion",
                "output": "o",
                "autoencoder": "a",
                "data": {"source": "s"},
                "model": {},
                "train": {"steps": 1},
                "schedule": schedule,
                "noise_levels": levels,
            }
        )
        for schedule, levels in (("vp", "log_normal"), ({"name": "vp"}, {"name": "log_normal", "params": {}}))
    )
    assert a == b and a.schedule.name == "vp" and a.model_dump()["schedule"] == {"name": "vp", "params": {}}
