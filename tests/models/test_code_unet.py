"""The first and the last layer of a U-Net over codes, made of the codebook."""

import math

import pytest
import torch
from diffusers import UNet2DModel

from latentdiff.models.code_unet import continue_from_latents, start_from_codebook
from latentdiff.pipelines.discrete_diffusion import code_logits


def small_unet(channels_in, channels_out):
    return UNet2DModel(
        sample_size=4,
        in_channels=channels_in,
        out_channels=channels_out,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )


def test_a_network_starts_with_codes_of_equal_vectors_alike_and_with_their_frequencies():
    torch.manual_seed(0)
    levels, num_codes = 2, 5
    unet = small_unet(levels * (num_codes + 1), levels * num_codes)
    vectors = torch.randn(levels, num_codes, 3)
    vectors[0, 2] = vectors[0, 1]
    counts = torch.tensor([[9, 3, 7, 0, 1], [4, 4, 4, 4, 4]])
    start_from_codebook(unet, vectors, counts)

    def logits(level, code):
        codes = torch.full((1, levels, 4, 4), num_codes)
        codes[0, level, 1, 2] = code
        with torch.no_grad():
            return code_logits(unet, codes, torch.ones(1), num_codes)

    # The input: codes 1 and 2 of level 0 are one vector, those of level 1 are not, and the mask is neither
    torch.testing.assert_close(logits(0, 1), logits(0, 2))
    assert (logits(1, 1) - logits(1, 2)).abs().max() > 1e-3
    assert (logits(0, 1) - logits(0, num_codes)).abs().max() > 1e-3
    # The output: equal vectors differ by the logarithm of their frequencies alone
    out = logits(0, 4)
    ratio = torch.full((1, 4, 4), math.log((3 + 1) / (7 + 1)))
    torch.testing.assert_close(out[:, 0, ..., 1] - out[:, 0, ..., 2], ratio)
    assert (out[:, 1, ..., 1] - out[:, 1, ..., 2]).abs().max() > 1e-3
    torch.testing.assert_close(unet.conv_out.bias[num_codes:], torch.zeros(num_codes))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_layers_of_latents_go_on_as_layers_of_codes(sign):
    torch.manual_seed(0)
    levels, num_codes, dim = 2, 5, 3
    old = small_unet(dim, dim)
    new = small_unet(levels * (num_codes + 1), levels * num_codes)
    vectors = torch.randn(levels, num_codes, dim)
    counts = torch.tensor([[9, 3, 7, 0, 1], [4, 4, 4, 4, 4]])
    with torch.no_grad():
        new.conv_in.bias.copy_(old.conv_in.bias)
    continue_from_latents(new, old.conv_in, old.conv_out, vectors, counts, sign)
    codes = torch.randint(num_codes, (1, levels, 4, 4))
    latents = sum(vectors[level][codes[:, level]] for level in range(levels)).movedim(-1, 1)
    shown = torch.zeros(1, levels, num_codes + 1, 4, 4).scatter_(2, codes[:, :, None], 1.0)
    hidden = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        # The first layer: what it gave for the latents, and something else for a mask
        torch.testing.assert_close(new.conv_in(shown.flatten(1, 2)), old.conv_in(latents))
        shown[:, 1] = 0
        without = new.conv_in(shown.flatten(1, 2))
        shown[:, 1, num_codes] = 1
        assert (new.conv_in(shown.flatten(1, 2)) - without).abs().max() > 1e-3
        # The last one: the product of a code's vector with what the old one gave without its bias
        logits = new.conv_out(hidden).unflatten(1, (levels, num_codes)) - new.conv_out.bias.view(1, levels, num_codes, 1, 1)
        given = old.conv_out(hidden) - old.conv_out.bias[None, :, None, None]
    centred = vectors - vectors.mean(1, keepdim=True)
    spread = centred.square().sum(2).mean(1)
    expected = 2 * sign * torch.einsum("lkd,bdxy->blkxy", centred / spread[:, None, None], given)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert new.conv_out.bias[2] > new.conv_out.bias[1] > new.conv_out.bias[3]  # as often as the codes occur
