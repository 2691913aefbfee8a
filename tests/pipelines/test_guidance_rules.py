"""Rules of guidance and autoguidance by arguments of the pipeline, with a scheduler of diffusers and with a sampler."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from test_pipeline import latents_of, random_pipe
from tiny_models import tiny_unet

from latentdiff.denoiser import Denoiser
from latentdiff.guidance import RULES
from latentdiff.pipelines.latent_diffusion import PipelineInputError

CALL = dict(class_labels=[0, 1], num_inference_steps=4, guidance_scale=4.0)
SCHEDULERS = {
    "ddim": (DDIMScheduler(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True), "ddim"),
    "euler": (EulerDiscreteScheduler(timestep_spacing="trailing", prediction_type="v_prediction"), "euler"),
    "flow": (FlowMatchEulerDiscreteScheduler(), "euler"),
}
RULES_TRIED = {
    "cfg": {},
    "rescale": {"guidance_rescale": 0.8},
    "apg": {"guidance_rule": "apg"},
    "apg with options": {"guidance_rule": "apg", "guidance_options": {"parallel": 0.4, "threshold": 0.5}},
    "apg with momentum": {"guidance_rule": "apg", "guidance_options": {"momentum": -0.5}},
    "cfg_zero": {"guidance_rule": "cfg_zero"},
    "cfg_zero with zero-init": {"guidance_rule": "cfg_zero", "guidance_options": {"zero_init": 0.5}},
    "cfg_zero rescaled": {"guidance_rule": "cfg_zero", "guidance_rescale": 0.5},
}


def weaker():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return tiny_unet()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rule", RULES_TRIED)
def test_a_rule_is_the_same_with_a_scheduler_and_with_a_sampler(name, rule):
    scheduler, sampler = SCHEDULERS[name]
    pipe = random_pipe(scheduler)
    times = []

    def note(pipe, step, timestep, tensors):
        times.append(float(timestep))

    by_scheduler = latents_of(pipe, **CALL, **RULES_TRIED[rule], callback_on_step_end=note)
    schedule = Denoiser.from_pipeline(pipe).schedule
    grid = [*(float(schedule.time_from_timestep(timestep)) for timestep in times), 0.0]
    by_sampler = latents_of(pipe, **CALL, **RULES_TRIED[rule], sampler=sampler, sampler_options={"grid": grid})
    torch.testing.assert_close(by_scheduler, by_sampler, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", [None, "heun"])
def test_each_rule_changes_the_latents_and_the_batch_does_not(sampler):
    results = {}
    for rule, arguments in RULES_TRIED.items():
        pipe = random_pipe()
        call = {**CALL, **arguments, "sampler": sampler}
        results[rule] = latents_of(pipe, **call)
        alone = latents_of(pipe, **{**call, "class_labels": [0]})
        torch.testing.assert_close(alone[0], results[rule][0], rtol=1e-4, atol=1e-4)
    for rule, latents in results.items():
        assert rule == "cfg" or (latents - results["cfg"]).abs().max() > 1e-3, rule
    assert set(RULES) <= {arguments.get("guidance_rule", "cfg") for arguments in RULES_TRIED.values()}


@pytest.mark.parametrize("sampler", [None, "euler"])
def test_autoguidance_goes_from_the_weak_network_through_the_strong_one(sampler):
    pipe, weak = random_pipe(), weaker()
    call = {**CALL, "sampler": sampler}
    strong = latents_of(pipe, **{**call, "guidance_scale": 1.0})
    assert torch.equal(latents_of(pipe, **{**call, "guidance_scale": 1.0}, weak_unet=weak), strong)
    other = random_pipe()
    other.unet = weak
    alone = latents_of(other, **{**call, "guidance_scale": 1.0})
    torch.testing.assert_close(latents_of(pipe, **{**call, "guidance_scale": 0.0}, weak_unet=weak), alone)
    results = [latents_of(pipe, **call, weak_unet=weak, **rule) for rule in ({}, {"guidance_rule": "apg"})]
    assert all((result - strong).abs().max() > 1e-2 for result in results)
    assert (results[0] - results[1]).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", [None, "euler"])
def test_a_default_rule_is_taken_where_the_call_names_none(sampler, tmp_path):
    call, options = {**CALL, "sampler": sampler}, {"parallel": 0.4}
    plain = random_pipe()
    assert not {key for key in plain.config if key.startswith("default_guidance_r") or key == "default_guidance_options"}
    pipe = random_pipe(default_guidance_rule="apg", default_guidance_rescale=0.5, default_guidance_options=options)
    default = {"guidance_rule": "apg", "guidance_rescale": 0.5, "guidance_options": options}
    for given, same in (
        ({}, default),
        ({"guidance_rescale": 0.0}, {**default, "guidance_rescale": 0.0}),
        ({"guidance_options": {"parallel": 0.9}}, {**default, "guidance_options": {"parallel": 0.9}}),
        ({"guidance_rule": "apg"}, {"guidance_rule": "apg", "guidance_rescale": 0.5}),  # without the default options
        ({"guidance_rule": "cfg", "guidance_rescale": 0.0}, {}),
    ):
        assert torch.equal(latents_of(pipe, **call, **given), latents_of(plain, **call, **same)), given
    off = {**call, "guidance_scale": 1.0}
    assert pipe.match_guidance_rule(None, None, None, is_guided=False) is None
    assert torch.equal(latents_of(pipe, **off), latents_of(plain, **off))


def test_autoguidance_needs_no_class_and_no_dropout():
    pipe, weak = random_pipe(null_class=None), weaker()
    assert bool(latents_of(pipe, class_labels=[0, 3], guidance_scale=2.0, weak_unet=weak).isfinite().all())


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"guidance_rule": "pag"}, "guidance rule: 'pag' is unknown; valid: cfg, apg, cfg_zero"),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5: must be from 0"),
        ({"guidance_rescale": "much"}, "guidance_rescale much: must be from 0"),
        ({"guidance_options": {"parallel": 0.5}}, "cfg has no parallel; there are"),
        ({"guidance_rule": "apg", "guidance_options": {"eta": 0.5}}, "valid: parallel, threshold and momentum"),
        ({"guidance_options": {"rescale": 0.5}}, "guidance_rule: must be a name"),
        ({"weak_unet": "", "negative_class_labels": [1, 2]}, "weak_unet: stands in for the negative"),
        ({"weak_unet": "", "guidance_scale": -1.0}, "guidance_scale -1: must be a finite number"),
    ],
)
@pytest.mark.parametrize("sampler", [None, "euler"])
def test_mistakes_are_named(arguments, said, sampler):
    with pytest.raises(PipelineInputError, match=said):
        random_pipe()(**{**CALL, **arguments, "sampler": sampler})
