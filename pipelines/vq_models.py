"""VQModel of diffusers with two other quantisers: codebooks for what is left over (residual VQ), and a fixed grid (FSQ).

This file needs diffusers and torch alone. It is saved beside the weights, so plain diffusers opens such an autoencoder:

    AutoModel.from_pretrained(folder, trust_remote_code=True)

Both classes are used as a VQModel is: `encode(x).latents` are latents before they are quantised, and `decode(latents)`
quantises them. `quantize.embedding.weight` holds the codebooks of all L levels, one after the other, [L K, d].
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from torch import Tensor, nn
from torch.nn import functional as F

# Read now and not when saving: diffusers runs this file from a cache, where another folder's file may replace it
_SOURCE = Path(__file__).read_text(encoding="utf-8")
MODULE = "vq_models"  # this file's name in a saved folder


class SavedWithItsCode(VQModel, ModelMixin):  # diffusers looks for a ModelMixin in this module, to know how to load a part
    """A VQModel whose folder also holds this file, and a config that names the class in it."""

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json and this file into a folder. save_pretrained calls it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        file = Path(save_directory) / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config = {
            key: value for key, value in config.items() if key not in ("norm_type", "lookup_from_codebook", "force_upcast")
        }
        config["auto_map"] = {"AutoModel": f"{MODULE}.{type(self).__name__}"}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (file.parent / f"{MODULE}.py").write_text(_SOURCE, encoding="utf-8")


class ResidualQuantizer(nn.Module):
    """L codebooks of K codes: each level quantises what the levels before it left over.

    SoundStream (arXiv 2107.03312), algorithm 1; for images RQ-VAE (arXiv 2203.01941). The quantised latent is the sum of one
    row of each codebook.
    """

    def __init__(self, num_quantizers: int, num_codes: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.num_quantizers, self.n_e, self.vq_embed_dim, self.beta = num_quantizers, num_codes, dim, beta
        self.embedding = nn.Embedding(num_quantizers * num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_codes, 1.0 / num_codes)  # as in VQModel

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """(quantised z [B, d, h, w] with the gradient straight through, loss, (None, None, codes [B h w, L])), as in VQModel.

        z: [B, d, h, w]. The loss is the sum over the levels of |sg(r) - e|^2 + beta |r - sg(e)|^2, each a mean over
        positions and channels, with e the level's row and r = z - sg(the sum of the rows before it).
        """
        flat = z.movedim(1, -1).reshape(-1, self.vq_embed_dim)  # [B h w, d]
        total, loss, codes = torch.zeros_like(flat), flat.new_zeros(()), []
        for book in self.embedding.weight.view(self.num_quantizers, self.n_e, -1):
            rest = flat - total
            nearest = torch.cdist(rest.detach().float(), book.detach().float()).argmin(1)
            row = book[nearest]
            loss = loss + F.mse_loss(row, rest.detach()) + self.beta * F.mse_loss(rest, row.detach())
            total = total + row.detach()
            codes.append(nearest)
        quantised = flat + (total - flat).detach()
        shape = (z.shape[0], *z.shape[2:], self.vq_embed_dim)
        return quantised.view(shape).movedim(-1, 1).contiguous(), loss, (None, None, torch.stack(codes, 1))


class ResidualVQModel(SavedWithItsCode):
    """A VQModel with a `ResidualQuantizer`. Arguments as of VQModel, and num_quantizers, the number of levels L."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        mid_block_add_attention: bool = True,
        num_quantizers: int = 4,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=1,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=vq_embed_dim,
            scaling_factor=scaling_factor,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quantize = ResidualQuantizer(num_quantizers, num_vq_embeddings, vq_embed_dim or latent_channels)
        self.register_to_config(num_vq_embeddings=num_vq_embeddings)  # VQModel, which has made none of its own, noted 1


class GridQuantizer(nn.Module):
    """Finite scalar quantisation (FSQ, arXiv 2309.15505): each channel is rounded to one of a few levels. Nothing is learnt.

    The code of a position numbers its levels, the first channel fastest. `embedding` holds the whole grid, [K, d].
    """

    fixed = True  # the codebook is not trained

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels, self.n_e, self.vq_embed_dim = tuple(levels), math.prod(levels), len(levels)
        counts, basis = torch.tensor(levels), torch.tensor([math.prod(levels[:k]) for k in range(len(levels))])
        grid = torch.arange(self.n_e)[:, None] // basis % counts  # [K, d], from 0
        self.embedding = nn.Embedding(self.n_e, self.vq_embed_dim, _weight=(grid - counts // 2) / (counts // 2))
        self.embedding.requires_grad_(False)

    def bound(self, z: Tensor, eps: float = 1e-3) -> Tensor:
        """z [B, d, h, w] with each channel brought into the range of its levels, -1 to 1, by tanh; not rounded.

        The paper's appendix A.1: an even number of levels is not symmetric about 0, so the tanh is moved by half a level.
        """
        counts = torch.tensor(self.levels, device=z.device)[:, None, None]
        half = (counts - 1) * (1 + eps) / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0)
        return ((z.float() + torch.atanh(offset / half)).tanh() * half - offset) / (counts // 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """(z rounded to the grid [B, d, h, w] with the gradient straight through, 0, (None, None, codes [B h w])).

        z: [B, d, h, w], bounded.
        """
        counts = torch.tensor(self.levels, device=z.device)[:, None, None]
        middle = counts // 2
        steps = ((z.detach().float() * middle).round() + middle).long()
        steps = steps.clamp_min(0).minimum(counts - 1)  # [B, d, h, w], from 0
        quantised = z + (((steps - middle) / middle).to(z) - z).detach()
        basis = torch.tensor([math.prod(self.levels[:k]) for k in range(len(self.levels))], device=z.device)
        codes = (steps * basis[:, None, None]).sum(1)
        return quantised, z.new_zeros(()), (None, None, codes.flatten())


class FSQModel(SavedWithItsCode):
    """A VQModel with a `GridQuantizer`. Arguments as of VQModel, with fsq_levels, the levels of each latent channel.

    num_vq_embeddings and vq_embed_dim follow from fsq_levels. The paper's table 1 has (8, 6, 5) for about 256 codes,
    (8, 5, 5, 5) for 1,024 and (7, 5, 5, 5, 5) for 4,096. `encode` gives latents that are bounded and not yet rounded.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
        mid_block_add_attention: bool = True,
        fsq_levels: tuple[int, ...] = (8, 5, 5, 5),
        num_vq_embeddings: int | None = None,
        vq_embed_dim: int | None = None,
    ):
        if not fsq_levels or any(not isinstance(n, int) or n < 3 for n in fsq_levels):
            raise ValueError(f"fsq_levels {list(fsq_levels)}: must be whole numbers of at least 3, one for each channel")
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=1,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=len(fsq_levels),
            scaling_factor=scaling_factor,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quantize = GridQuantizer(tuple(fsq_levels))
        if (num_vq_embeddings or self.quantize.n_e, vq_embed_dim or len(fsq_levels)) != (self.quantize.n_e, len(fsq_levels)):
            raise ValueError("num_vq_embeddings and vq_embed_dim follow from fsq_levels; leave them out")
        self.register_to_config(num_vq_embeddings=self.quantize.n_e, vq_embed_dim=len(fsq_levels))

    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """The latents of images [B, C, H, W]: bounded, not rounded, [B, d, h, w]."""
        latents = self.quantize.bound(super().encode(x).latents)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)
