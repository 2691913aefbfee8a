"""Schedulers swapped in by X.from_config(pipe.scheduler.config): each draws the right thing, or is refused in one line.

The network knows the answer: its data are one Gaussian per dimension, so the mean and the deviation of the images are known,
and deterministic schedulers agree with the published one image by image.
"""

import threading

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from tiny_models import PictureVae

from latentdiff import checkpoints, prediction
from latentdiff.errors import UserError
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline, PipelineInputError
from latentdiff.schedules import make_schedule
from latentdiff.utils.tensors import widen

MEAN, STD = 0.8, 0.6  # of the data, within what clip_sample and thresholding would cut off at 1
COUNT, SHAPE = 256, (2, 2, 2)
STEPS = 30
# Deterministic schedulers of first to third order differ by up to 0.053 at 30 steps; clipping to 1 moves images by 0.14.
CLOSE = 0.06
# Of 2048 values with deviation 0.6 the mean has a standard error of 0.013. First-order stochastic schedulers narrow the
# distribution by up to 15 per cent at 30 steps; LCM, which is meant for networks distilled for it, by a third.
MEAN_OFF, STD_OFF, STD_OFF_LCM = 0.06, 0.2, 0.4
NAMES = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
PATHS = {
    "cosine": ("v_prediction", None),
    "vp": ("epsilon", None),
    "ddpm-scaled-linear": ("v_prediction", "DDIMScheduler"),
    "flow": ("flow", None),
    "flow by DPM-Solver": ("flow", "DPMSolverMultistepScheduler"),
    "edm": ("edm", None),
}
VP = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
TWO_STAGE = {"HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"}
FLOW = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
WORKING = {
    "cosine": VP - TWO_STAGE,
    "vp": VP,
    "ddpm-scaled-linear": VP,
    "flow": FLOW,
    "flow by DPM-Solver": FLOW,
    "edm": {"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"},
}
STOCHASTIC = {
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}


@pytest.fixture(autouse=True)
def no_warnings_of_diffusers():
    """from_config warns of every entry that another class does not know; the betas alone are a thousand numbers."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(before)


class GaussianNet(torch.nn.Module):
    """The perfect network for independent N(MEAN, STD^2)."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, schedule, kind):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self.schedule, self.kind = schedule, kind
        self.config = FrozenDict(in_channels=SHAPE[0], sample_size=SHAPE[1])

    def forward(self, sample, timestep):
        s = self.schedule
        t = s.time_from_timestep(torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)[0]).clamp(max=s.t_max)
        x = sample.double() / widen(s.input_scale(t), sample.double())
        alpha, sigma = s.alpha(t), s.sigma(t)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return UNet2DOutput(prediction.target(self.kind, s, x0, (x - alpha * x0) / sigma, t).float())


def pipe_of(path):
    name, (kind, scheduler) = path.split(" ")[0], PATHS[path]
    schedule = make_schedule(name)
    own = schedule.to_scheduler(scheduler, kind)
    parts = GaussianNet(schedule, kind), PictureVae(torch.zeros(1, 2, 2)), own
    pipe = LatentDiffusionPipeline(*parts, prediction=kind, schedule={"name": name})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, steps=STEPS, **call):
    noise = torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    call = {"num_images_per_label": COUNT, "latents": noise, "generator": generator, "output_type": "latent", **call}
    return pipe(num_inference_steps=steps, **call).images


@pytest.mark.parametrize("path", PATHS)
def test_every_scheduler_of_diffusers_draws_the_data_or_is_refused_in_a_line(path):
    pipe = pipe_of(path)
    own = pipe.scheduler
    expected, working = latents(pipe), set()
    for name in NAMES:
        try:
            scheduler = getattr(diffusers, name).from_config(own.config)
        except (ImportError, TypeError, ValueError):  # needs torchsde, or things that no config has
            continue
        pipe.scheduler = scheduler
        try:
            made = latents(pipe)
        except PipelineInputError as refusal:
            assert str(refusal).startswith(f"scheduler: {name} ") and "\n" not in str(refusal)
            continue
        working.add(name)
        off = float(made.mean()) - MEAN, float(made.std()) / STD - 1
        assert abs(off[0]) < MEAN_OFF and abs(off[1]) < (STD_OFF_LCM if "LCM" in name else STD_OFF), (name, off)
        if name not in STOCHASTIC:
            assert float((made - expected).abs().mean()) < CLOSE, name
    assert working == WORKING[path]


@pytest.mark.parametrize("path", ["cosine", "vp"])
@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas"])
def test_other_grids_of_sigmas_draw_the_data_or_are_refused(path, option):
    pipe = pipe_of(path)
    own, expected = pipe.scheduler, latents(pipe)
    for name in ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]:
        if option == "use_lu_lambdas" and name != "DPMSolverMultistepScheduler":
            continue
        pipe.scheduler = getattr(diffusers, name).from_config(own.config, **{option: True})
        if (path, option) == ("cosine", "use_beta_sigmas"):  # between sigmas 20,000 and 0.0016 it has none below 100
            with pytest.raises(PipelineInputError, match=f"scheduler: {name} with use_beta_sigmas takes all its steps at"):
                latents(pipe)
            continue
        # On vp beta sigmas put few steps at low noise: Euler's images are narrower by 40 per cent
        bound = 0.25 if option == "use_beta_sigmas" else 0.12
        assert float((latents(pipe) - expected).abs().mean()) < bound, name


def test_a_flow_with_sigmas_of_betas_is_refused_here_and_in_training():
    pipe = pipe_of("flow by DPM-Solver")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    with pytest.raises(PipelineInputError, match="does not run a flow with use_karras_sigmas"):
        latents(pipe)
    with pytest.raises(UserError, match="does not run a flow with use_karras_sigmas"):
        make_schedule("flow").to_scheduler("DPMSolverMultistepScheduler", "flow", use_karras_sigmas=True)


@pytest.mark.parametrize("name", ["cosine", "ddpm-cosine"])
def test_training_refuses_heun_where_almost_nothing_of_the_data_is_left(name):
    with pytest.raises(UserError, match="HeunDiscreteScheduler cannot start at alpha.2"):
        make_schedule(name).to_scheduler("HeunDiscreteScheduler", "v_prediction")
    make_schedule("ddpm-linear").to_scheduler("HeunDiscreteScheduler", "v_prediction")


def test_another_prediction_is_refused_and_other_betas_are_warned_of(monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr("latentdiff.pipelines.latent_diffusion._LOGGER.warning", warnings.append)
    pipe = pipe_of("vp")
    own = pipe.scheduler
    pipe.scheduler = diffusers.DDIMScheduler.from_config(own.config, prediction_type="v_prediction")
    with pytest.raises(PipelineInputError, match="prediction_type is v_prediction, the network predicts epsilon"):
        latents(pipe)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(own.config)
    latents(pipe, 2)
    assert warnings == []
    pipe.scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    latents(pipe, 2)
    assert len(warnings) == 1 and warnings[0].startswith("DDIMScheduler has other betas than the checkpoint's own scheduler")


def test_a_scheduler_of_somebodys_own_runs():
    class Own(diffusers.DDIMScheduler):
        pass

    pipe = pipe_of("vp")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    expected = latents(pipe, 3)
    pipe.scheduler = Own.from_config(pipe.scheduler.config)
    assert torch.equal(latents(pipe, 3), expected)


def test_two_threads_on_one_pipeline_draw_what_each_draws_alone():
    pipe = pipe_of("vp")
    lengths = [7, 12, 19, 23]
    alone = [latents(pipe, n) for n in lengths]
    together, barrier = {}, threading.Barrier(len(lengths))

    def draw(n):
        barrier.wait()
        together[n] = [latents(pipe, n) for _ in range(5)]

    threads = [threading.Thread(target=draw, args=(n,)) for n in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, expected in zip(lengths, alone, strict=True):
        assert len(together.get(n, [])) == 5, n
        assert all(torch.equal(made, expected) for made in together[n])


@pytest.mark.parametrize("sampler", [None, "ddim"])
def test_a_callback_may_interrupt_and_sees_the_steps(sampler):
    pipe, steps = pipe_of("vp"), []

    def stop_after_two(pipe, step, timestep, tensors):
        assert list(tensors) == ["latents"] and pipe.num_timesteps == 6 and pipe.guidance_scale == 1.0
        steps.append(tensors["latents"].clone())
        pipe._interrupt = len(steps) == 2
        return {}

    made = latents(pipe, 6, callback_on_step_end=stop_after_two, sampler=sampler)
    assert len(steps) == 2 and torch.equal(made, steps[-1])
    assert not torch.equal(latents(pipe, 6, sampler=sampler), made)  # the next call is whole again


def test_what_a_callback_is_given_is_chosen_and_checked():
    pipe, given = pipe_of("vp"), []
    call = dict(steps=2, callback_on_step_end=lambda pipe, i, t, tensors: given.append(sorted(tensors)))
    latents(pipe, **call)
    latents(pipe, **call, callback_on_step_end_tensor_inputs=[])
    assert given == [["latents"]] * 2 + [[]] * 2
    with pytest.raises(PipelineInputError, match=r"callback_on_step_end_tensor_inputs \['prompt_embeds'\]: must be of"):
        latents(pipe, **call, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_a_tuple_of_generators_and_integers_of_numpy_and_torch_are_taken():
    pipe = checkpoints.load("weights/fashion-mnist")
    pipe.set_progress_bar_config(disable=True)

    def generators():
        return [torch.Generator().manual_seed(k) for k in (1, 2)]

    def call(labels, generator):
        return pipe(class_labels=labels, num_inference_steps=2, generator=generator, output_type="latent").images

    expected = call([3, 7], generators())
    for labels in ([np.int64(3), np.uint8(7)], np.array([3, 7]), [torch.tensor(3), torch.tensor(7)]):
        assert torch.equal(call(labels, tuple(generators())), expected)
    for wrong in (True, np.bool_(True), 3.0, np.float32(3), torch.tensor(3.0), np.int64(10), -1):
        with pytest.raises(PipelineInputError, match="unknown class"):
            call([wrong, 7], generators())
