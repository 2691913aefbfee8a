"""Residual and finite scalar quantisers: against brute force, against vector-quantize-pytorch, and on disk."""

import json
import sys

import pytest
import torch
from diffusers import AutoModel
from planted import planted

from latentdiff.errors import UserError
from latentdiff.models.autoencoder import build_autoencoder, load_autoencoder, store_normaliser
from latentdiff.models.codec import LatentCodec
from latentdiff.pipelines import vq_models
from latentdiff.pipelines.vq_models import FSQModel, GridQuantizer, ResidualQuantizer, ResidualVQModel

SIZES = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


def residual() -> ResidualVQModel:
    torch.manual_seed(0)
    model = ResidualVQModel(**SIZES, vq_embed_dim=3, num_vq_embeddings=16, num_quantizers=3)
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    return model.eval()


def grid() -> FSQModel:
    torch.manual_seed(0)
    return FSQModel(**SIZES, fsq_levels=(5, 4, 3)).eval()


MODELS = {"ResidualVQModel": (residual, 16, 3), "FSQModel": (grid, 60, 1)}  # class: (make, K, L)


def pictures(count=3):
    return torch.rand((count, 1, 16, 24), generator=torch.Generator().manual_seed(0)) * 2 - 1


def check_residual(forward):
    """Each level takes the row nearest to what is left, the losses add up, and the gradients are the paper's."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(3, 8, 2)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 2, 3, 3, requires_grad=True)
    quantised, loss, (_, _, codes) = forward(quantizer, z)
    books, rest = quantizer.embedding.weight.detach().view(3, 8, 2), z.detach().movedim(1, -1).reshape(-1, 2)
    expected, pull, moved = 0.0, torch.zeros_like(rest), torch.zeros(3, 8, 2)
    for level, book in enumerate(books):
        nearest = (rest[:, None] - book).square().sum(-1).argmin(1)
        assert torch.equal(codes[:, level], nearest)
        before, rest = rest, rest - book[nearest]
        expected += 1.25 * float(rest.square().mean())
        pull += 0.25 * 2 * rest / rest.numel()  # of |r - sg(e)|^2 on z
        moved[level].index_add_(0, nearest, -2 * (before - book[nearest]) / rest.numel())  # of |sg(r) - e|^2 on e
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    of_z, of_books = torch.autograd.grad(loss, (z, quantizer.embedding.weight), retain_graph=True)
    torch.testing.assert_close(of_z.movedim(1, -1).reshape(-1, 2), pull)
    torch.testing.assert_close(of_books.view(3, 8, 2), moved)
    torch.testing.assert_close(
        quantised.detach().movedim(1, -1).reshape(-1, 2), z.detach().movedim(1, -1).reshape(-1, 2) - rest
    )
    through = torch.autograd.grad((quantised * z.detach()).sum(), z)[0]
    torch.testing.assert_close(through, z.detach())  # straight through


def test_residual_quantisation_is_the_paper_s():
    check_residual(ResidualQuantizer.forward)
    beta_on_the_codebook = (
        "F.mse_loss(row, rest.detach()) + self.beta * F.mse_loss(rest, row.detach())",
        "self.beta * F.mse_loss(row, rest.detach()) + F.mse_loss(rest, row.detach())",
    )
    for bug in (
        beta_on_the_codebook,
        ("total = total + row.detach()", "total = total + row"),
        ("rest = flat - total", "rest = flat"),
    ):
        with pytest.raises(AssertionError):
            check_residual(planted(ResidualQuantizer.forward, bug))


def test_the_grid_is_that_of_vector_quantize_pytorch():
    peer = pytest.importorskip("vector_quantize_pytorch")
    for levels in ((5, 4, 3), (8, 5, 5, 5), (3,), (7, 6)):
        own, theirs = GridQuantizer(levels), peer.FSQ(list(levels))
        z = 3 * torch.randn(4, len(levels), 6, 6, generator=torch.Generator().manual_seed(0))
        quantised, _, (_, _, codes) = own(own.bound(z))
        expected, indices = theirs(z)
        torch.testing.assert_close(quantised, expected)
        assert torch.equal(codes.view(indices.shape), indices.long())
        torch.testing.assert_close(own.embedding.weight.detach(), theirs.implicit_codebook)
        assert len(codes.unique()) > 0.5 * min(len(own.embedding.weight), 144)


def test_residual_levels_are_those_of_vector_quantize_pytorch():
    peer = pytest.importorskip("vector_quantize_pytorch")
    own = residual().quantize
    theirs = peer.ResidualVQ(dim=3, num_quantizers=3, codebook_size=16).eval()
    for layer, book in zip(theirs.layers, own.embedding.weight.detach().view(3, 16, 3), strict=True):
        layer._codebook.embed.data.copy_(book[None])
    z = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    expected, indices, _ = theirs(z.movedim(1, -1).reshape(1, -1, 3))
    quantised, _, (_, _, codes) = own(z)
    assert torch.equal(codes, indices[0])
    torch.testing.assert_close(quantised.movedim(1, -1).reshape(1, -1, 3), expected)


def test_fixed_grids_get_no_gradient_and_latents_do():
    model = grid()
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    quantised, loss, _ = model.quantize(model.quantize.bound(z))
    quantised.sum().backward()
    assert bool((z.grad > 0).all()) and float(loss) == 0 and model.quantize.embedding.weight.grad is None


@pytest.mark.parametrize("name", MODELS)
def test_codes_rows_and_pictures_agree(name):
    make, num_codes, levels = MODELS[name]
    codec, x = LatentCodec(make()), pictures()
    assert (codec.num_codes, codec.code_levels) == (num_codes, levels)
    codes = codec.codes(x)
    assert codes.shape == (3, levels, 8, 12) and codes.dtype == torch.int64
    torch.testing.assert_close(codec.decode_codes(codes), codec.reconstruct(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(codec.codes(x[1:2]), codes[1:2])  # nothing mixes samples
    for level in range(levels):  # and every level is seen
        other = codes.clone()
        other[:, level] = (other[:, level] + 1) % num_codes
        assert (codec.decode_codes(other) - codec.decode_codes(codes)).abs().amax() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_it_opens_in_plain_diffusers_and_in_latentdiff(name, tmp_path, monkeypatch):
    model, x = MODELS[name][0](), pictures()
    raw = model.encode(x).latents.detach()
    store_normaliser(model, raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0))
    model.save_pretrained(tmp_path / "autoencoder")
    assert json.loads((tmp_path / "autoencoder" / "config.json").read_text())["auto_map"] == {"AutoModel": f"vq_models.{name}"}
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for known in [known for known in sys.modules if known.split(".")[0] == "diffusers_modules"]:
        monkeypatch.delitem(sys.modules, known)
    plain = AutoModel.from_pretrained(str(tmp_path / "autoencoder"), trust_remote_code=True)
    assert type(plain) is not type(model) and type(plain).__name__ == name  # of the folder's own file
    own = load_autoencoder(str(tmp_path))
    assert type(own) is type(model)
    for loaded in (plain, own):
        assert torch.equal(loaded.eval()(x).sample, model(x).sample)
        assert loaded.config.latents_mean == model.config.latents_mean
    z = LatentCodec(own).normalise(raw)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-4, atol=0)
    for known in [known for known in sys.modules if known.split(".")[0] == "diffusers_modules"]:
        del sys.modules[known]


def test_code_that_lies_in_a_folder_is_not_run_by_latentdiff(tmp_path):
    residual().save_pretrained(tmp_path)
    (tmp_path / "vq_models.py").write_text("raise SystemExit('run')\n")
    assert type(load_autoencoder(str(tmp_path))) is vq_models.ResidualVQModel


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fsq_levels": [8, 2]}, "model.config: FSQModel refuses it: fsq_levels .* at least 3"),
        ({"fsq_levels": [5, 5], "num_vq_embeddings": 24}, "follow from fsq_levels; leave them out"),
        ({"levels": [5, 5]}, "model.config.levels: unknown argument of FSQModel; did you mean 'fsq_levels'"),
    ],
)
def test_levels_that_cannot_be_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        build_autoencoder("FSQModel", {"block_out_channels": [8, 8], "norm_num_groups": 4, **config}, 1, None)
