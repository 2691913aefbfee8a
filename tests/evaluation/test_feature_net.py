"""The feature network: what it computes, how it is kept, and that its training learns and repeats."""

import json

import numpy as np
import pytest
import torch
from stripes import stripes

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.sources import ArraySource
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.evaluation.classification import label_accuracy
from latentdiff.evaluation.feature_training import shift_images, train_features
from latentdiff.models.feature_net import FeatureNet, extract, load_features

WIDTHS = (8, 8, 16)


def small_net(channels: int = 1, normed: bool = False) -> FeatureNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FeatureNet(channels, 3, WIDTHS, "small", {"class_names": ["a", "b", "c"]}, normed)


@pytest.mark.parametrize("channels, height, width", [(1, 28, 28), (3, 16, 33)])
def test_maps_features_and_logits_have_the_stated_shapes(channels, height, width):
    net = small_net(channels)
    x = torch.rand(2, channels, height, width) * 2 - 1
    half, quarter = [(-(-height // f), -(-width // f)) for f in (2, 4)]
    shapes = [tuple(m.shape) for m in net.maps(x)]
    assert shapes == [(2, 8, height, width), (2, 8, *half), (2, 16, *quarter)]
    assert net.features(x).shape == (2, net.dim) and net(x).shape == (2, 3)


def test_images_of_the_wrong_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\].*\[2, 3, 28, 28\]"):
        small_net()(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match="16"):
        small_net()(torch.zeros(2, 1, 28, 12))


def test_folding_keeps_the_function_and_ends_every_dependence_on_the_batch():
    net, x = small_net(normed=True), torch.rand(6, 1, 16, 16)
    net.train()
    for _ in range(20):  # gives the running statistics values of their own
        net(x * 3 + torch.rand(6, 1, 1, 1))
    expected = net.eval()(x)
    folded = net.fold()
    assert not any("norm" in key for key in folded.state_dict())
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.train()(x)[2], folded(x[2:3])[0], rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_images_through_a_frozen_network():
    net, x = small_net().requires_grad_(False), torch.rand(1, 1, 16, 16, requires_grad=True)
    for part in (*net.maps(x), net.features(x)):
        (gradient,) = torch.autograd.grad(part.square().sum(), x, retain_graph=True)
        assert gradient.abs().max() > 0


def test_a_saved_network_comes_back_equal_and_frozen(tmp_path):
    net = small_net().eval()
    net.save(tmp_path / "net")
    loaded, x = load_features(tmp_path / "net"), torch.rand(2, 1, 20, 20)
    assert (loaded.name, loaded.info, loaded.fingerprint()) == (net.name, net.info, net.fingerprint())
    assert torch.equal(loaded(x), net(x)) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["config.json", "hashes.json", "model.safetensors"]


def test_the_fingerprint_sees_one_changed_weight():
    net = small_net()
    before = net.fingerprint()
    with torch.no_grad():
        net.head.bias[0] += 1e-3
    assert net.fingerprint() != before


def test_a_network_with_batch_normalisation_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="fold"):
        small_net(normed=True).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_and_damaged_files_are_named(tmp_path, file):
    small_net().save(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / "hashes.json").unlink()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=file):
        load_features(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"{file}: not found"):
        load_features(tmp_path)


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path):
    small_net().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"classes": 4}))
    with pytest.raises(UserError, match="model.safetensors"):
        load_features(tmp_path)


def test_rgb_copies_of_grey_images_have_the_grey_images_features():
    net, x = small_net(), torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(extract(net, x.expand(-1, 3, -1, -1))[0], extract(net, x)[0])


def test_training_learns_to_tell_the_classes_and_keeps_the_facts():
    net = train_features(stripes(240), test=stripes(90, seed=1), steps=45, batch=32, widths=WIDTHS, name="stripes")
    assert label_accuracy(net, stripes(90, seed=2)) > 0.95
    assert net.info["test_accuracy"] > 0.95 and net.info["class_names"] == ["across", "down", "blank"]
    assert net.info["training"]["steps"] == 45 and not net.training


def test_training_of_four_steps_has_a_warm_up_of_one_step():
    assert train_features(stripes(30), steps=4, batch=8, widths=WIDTHS).info["training"]["steps"] == 4


def test_training_is_a_function_of_its_seed_alone():
    def fingerprint(seed: int) -> str:
        return train_features(stripes(30), steps=2, batch=8, widths=WIDTHS, seed=seed).fingerprint()

    state = torch.get_rng_state()
    first = fingerprint(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert fingerprint(0) == first != fingerprint(1)


def test_data_without_classes_are_refused():
    source = ArraySource("nameless", np.zeros((4, 16, 16, 1), np.uint8), None)
    with pytest.raises(UserError, match="nameless.*class"):
        train_features(ImageDataset(source, Preprocess()), steps=1)


def test_each_image_is_shifted_by_its_own_offset_and_all_offsets_occur():
    ramp = (torch.arange(20.0)[:, None] * 100 + torch.arange(20.0)).expand(200, 1, 20, 20)
    shifted = shift_images(ramp, 1, torch.Generator().manual_seed(0))
    offsets = shifted[:, 0, 10, 10] - ramp[:, 0, 10, 10]
    assert set(offsets.tolist()) == {100.0 * dy + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    inner = shifted[:, 0, 1:-1, 1:-1] - ramp[:, 0, 1:-1, 1:-1]
    assert torch.equal(inner, offsets[:, None, None].expand_as(inner))


def test_a_head_without_class_names_tells_no_classes():
    x = stripes(20).batch(range(20))[0]
    for info, tells in (({"class_names": ["a", "b", "c"]}, True), ({}, False)):
        assert (extract(FeatureNet(1, 3, WIDTHS, info=info).eval(), x)[1] is not None) == tells
