"""Schedulers made by to_scheduler, run by the pipeline on a network that knows the answer, against latentdiff's samplers."""

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from exact import mixture
from tiny_models import PictureVae

from latentdiff import prediction
from latentdiff.denoiser import Denoiser
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.schedules import NoiseSchedule, make_schedule
from latentdiff.utils.tensors import widen

SHAPE = (2, 2, 2)


class ExactNet(torch.nn.Module):
    """What a U-Net trained to perfection would say of a mixture, given its scaled input and a timestep of the schedule.

    Class 0 is the mixture, class 1 its first component, class 2 (the null class) its last. `calls`: (timestep, classes).
    """

    def __init__(self, schedule: NoiseSchedule, kind: str):
        super().__init__()
        m = mixture(SHAPE)
        self.weight = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self.schedule, self.kind, self.densities = schedule, kind, [m, m.only(0), m.only(2)]
        self.config = FrozenDict(in_channels=2, sample_size=2, num_class_embeds=3)
        self.calls: list[tuple[float, list[int]]] = []

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, sample, timestep, class_labels):
        timestep = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)[0]
        self.calls.append((float(timestep), class_labels.tolist()))
        s = self.schedule
        t = s.time_from_timestep(timestep)
        x = sample.double() / widen(s.input_scale(t), sample.double())
        rows = []
        for row, k in zip(x.split(1), class_labels.tolist(), strict=True):
            density = self.densities[k]
            seen = Denoiser.from_score(lambda x, t, d=density: d.score(x, s, t), s)(row, t)
            rows.append(prediction.target(self.kind, s, seen.x0, seen.eps, t))
        return UNet2DOutput(torch.cat(rows).float())


def pipe_of(schedule, kind, scheduler):
    net = ExactNet(schedule, kind)
    pipe = LatentDiffusionPipeline(
        net, PictureVae(torch.zeros(1, 2, 2)), scheduler, class_names=["all", "one"], null_class=2, prediction=kind
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


FLOW_DPM = "DPMSolverMultistepScheduler"
RUNS = {
    "flow dpm": ("flow", "flow", FLOW_DPM, {}, "dpmpp_2m"),
    "flow dpm shifted": ("flow", "flow", FLOW_DPM, {"flow_shift": 3.0}, "dpmpp_2m"),
    "edm euler": ("edm", "edm", "EDMEulerScheduler", {}, "euler"),
    "vp dpm": ("vp", "epsilon", FLOW_DPM, {}, "dpmpp_2m"),
    "vp heun": ("vp", "v_prediction", "HeunDiscreteScheduler", {}, "heun"),
    "zero snr": ("ddpm-linear", "v_prediction", FLOW_DPM, {"zero": True}, "dpmpp_2m"),
}


def network_times(pipe, **call):
    pipe(class_labels=[0], output_type="latent", **call)
    return [k for k, _ in pipe.unet.calls]


@pytest.mark.parametrize("run", RUNS)
def test_the_pipelines_scheduler_is_our_sampler_on_its_grid(run):
    name, kind, scheduler, config, sampler = RUNS[run]
    s = make_schedule(name, **({"zero_terminal_snr": True} if config.get("zero") else {}))
    peer = s.to_scheduler(scheduler, kind, **{k: v for k, v in config.items() if k != "zero"})
    pipe = pipe_of(s, kind, peer)
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    call = dict(class_labels=[0, 1, 0], guidance_scale=1.5, guidance_interval=(0.195, 0.805), output_type="latent")
    # diffusers' Heun averages slopes in sigma/alpha and ours along the path: they meet as the steps get small
    steps, tolerance = (50, 2e-3) if sampler == "heun" else (12, 1e-4)
    theirs = pipe(**call, latents=noise, num_inference_steps=steps).images
    peer.set_timesteps(steps)
    if name == "flow":
        grid = peer.sigmas.double()
    else:  # sigma / alpha, once each: Heun's list has every inner one twice
        ratio = torch.unique(peer.sigmas.double(), sorted=True).flip(0)
        grid = torch.cat([s.time_from_log_snr(-2 * ratio[:-1].log()).clamp(max=1), torch.zeros(1, dtype=torch.float64)])
    start = noise if s.prior_std == 1 else noise * (float(peer.init_noise_sigma) / s.prior_std)
    ours = pipe(**call, latents=start, sampler=sampler, sampler_options={"grid": grid}).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", [9, 20, 33])
def test_flow_dpm_solver_tells_the_network_the_exact_time(n):
    s = make_schedule("flow")
    peer = s.to_scheduler(FLOW_DPM)
    times = network_times(pipe_of(s, "flow", peer), num_inference_steps=n)
    torch.testing.assert_close(torch.tensor(times), 999 * (1 - torch.arange(n) / n), rtol=1e-5, atol=0)
    assert peer.timesteps.dtype == torch.int64  # what diffusers would feed: up to 1 less


def test_edm_feeds_a_quarter_of_ln_sigma_and_guides_in_t():
    s = make_schedule("edm")
    peer = s.to_scheduler()
    pipe = pipe_of(s, "edm", peer)
    pipe(class_labels=[0], guidance_scale=2.0, guidance_interval=(0.001, 0.1), num_inference_steps=10, output_type="latent")
    sigma = peer.sigmas[:-1].double()
    torch.testing.assert_close(torch.tensor([k for k, _ in pipe.unet.calls]).double(), 0.25 * sigma.log(), rtol=1e-5, atol=1e-6)
    assert [len(rows) == 2 for _, rows in pipe.unet.calls] == [0.001 <= x / 80 <= 0.1 for x in sigma.tolist()]


def test_a_network_that_hears_cut_timesteps_misses_by_more(monkeypatch):
    from latentdiff.pipelines import latent_diffusion as file

    s = make_schedule("flow")
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    call = dict(class_labels=[0, 1, 0], latents=noise, num_inference_steps=12, output_type="latent")
    exact = pipe_of(s, "flow", s.to_scheduler(FLOW_DPM))(**call).images
    monkeypatch.setattr(file, "network_times", lambda scheduler: scheduler.timesteps)
    cut = pipe_of(s, "flow", s.to_scheduler(FLOW_DPM))(**call).images
    assert 1e-4 < float((exact - cut).abs().max()) < 2e-2
