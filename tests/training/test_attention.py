"""The attention kernel of a training step: chosen where it pays, and the same values and gradients whichever it is."""

import pytest
import torch
from tiny_runs import diffusion_config
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from latentdiff.training import train, train_diffusion
from latentdiff.training.attention import SHORT, attention_kernel
from latentdiff.training.estimate import plan


def attend(context, dtype: torch.dtype, places: int) -> tuple[list[torch.Tensor], list[str]]:
    """Output and gradients of one attention, and the operations that were run."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, places, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, context:
        out = scaled_dot_product_attention(q, k, v)
        out.float().square().sum().backward()
    values = [tensor.detach().float() for tensor in (out, q.grad, k.grad, v.grad)]
    return values, [event.key for event in seen.key_averages()]


@pytest.mark.parametrize(
    "device, precision, places, plain",
    [
        ("cpu", "bfloat16", SHORT, True),
        ("cpu", "bfloat16", SHORT + 1, False),
        ("cpu", "float32", 16, False),
    ],
)
def test_short_bfloat16_attention_takes_matrix_products(device, precision, places, plain):
    context = attention_kernel(torch.device(device), precision, places)
    _, ran = attend(context, getattr(torch, precision), places)
    flash = any("flash_attention" in name for name in ran)
    assert flash != plain


def test_other_devices_keep_torchs_choice():
    before = torch.backends.cuda.flash_sdp_enabled()
    with attention_kernel(torch.device("cuda"), "bfloat16", 16):
        assert torch.backends.cuda.flash_sdp_enabled() == before


def test_both_kernels_agree():
    ours, _ = attend(attention_kernel(torch.device("cpu"), "bfloat16", 16), torch.bfloat16, 16)
    torchs, _ = attend(torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.bfloat16, 16)
    exact, _ = attend(torch.nn.attention.sdpa_kernel(SDPBackend.MATH), torch.float32, 16)
    for one, other, true in zip(ours, torchs, exact, strict=True):
        assert (one - other).abs().max() < 0.03 * other.abs().max()  # bfloat16 rounds to 0.4 %, several times over
        assert (one - true).abs().max() < 0.03 * true.abs().max()


def test_a_run_and_what_is_measured_before_it_take_the_same_kernel(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    asked = []

    def recorded(device, precision, positions):
        asked.append((device.type, precision, positions))
        return attention_kernel(device, precision, positions)

    monkeypatch.setattr(train_diffusion, "attention_kernel", recorded)
    changes = {"train__precision": "bfloat16", "train__steps": 1}
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes))
    (run,) = set(asked)
    asked.clear()
    plan(diffusion_config(stripe_folder, tmp_path / "plan", autoencoder_run, **changes), tmp_path / "plan.yaml")
    assert asked and set(asked) == {run} and run[1] == "bfloat16"
