"""The judge of text-to-image models: what it recognises, what it scores, ceiling, chance, memorisation, and the command."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from processes import carry_out, command
from tiny_models import tiny_unet, tiny_vae
from tiny_runs import autoencoder_config, diffusion_config, tree, write_yaml
from tiny_shapes import SIDE, SMALL, STYLES, THINGS, judge_tree, shape, write_shapes

from latentdiff.checkpoints import load, save
from latentdiff.config import load_config
from latentdiff.data.pairs import read_pairs, to_images
from latentdiff.errors import UserError
from latentdiff.evaluation.augmentation import augment
from latentdiff.evaluation.judge import FREE_PROMPTS, _check_pictures, draw
from latentdiff.evaluation.records import read_record
from latentdiff.evaluation.retrieval import (
    PictureIndex,
    augmented_scores,
    chosen_rows,
    index_pictures,
    judge_markdown,
    judge_pictures,
    nearest_training_distances,
)
from latentdiff.models.codec import LatentCodec
from latentdiff.models.judge_net import JudgeNet, embed, load_judge
from latentdiff.training import train
from latentdiff.training.train_judge import fit_judge


class FakePipeline:
    """Draws the data's own picture of each prompt, or of change(style, thing), as a pipeline would."""

    config = SimpleNamespace(null_class=None)

    def __init__(self, change=lambda style, thing: (style, thing)):
        self.change, self.batches = change, []

    def __call__(self, prompt, class_labels, generator, output_type, **call):
        assert output_type == "np" and len(generator) == len(prompt) == len(class_labels)
        self.batches.append(len(prompt))
        pairs = [self.change(*text.split(" style, ")) for text in prompt]
        images = np.stack([np.asarray(shape(thing, style)) for style, thing in pairs]) / 255
        return type("Output", (), {"images": images})


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data")


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory, shapes) -> Path:
    """What training writes by a config."""
    output = tmp_path_factory.mktemp("judge") / "run"
    return train(load_config(write_yaml(output.parent / "judge.yaml", judge_tree(shapes, output))))


@pytest.fixture(scope="module")
def gallery(judge_folder, shapes) -> PictureIndex:
    return index_pictures(load_judge(judge_folder), read_pairs(shapes))


def rows_of(gallery) -> torch.Tensor:
    return torch.arange(len(gallery.pairs))


def test_pairs_are_read_with_their_prompts(shapes):
    pairs = read_pairs(shapes)
    assert len(pairs) == 12 and pairs.style_names == STYLES and len(pairs.identity_names) == 6
    assert pairs.held_out.tolist() == [False] * 10 + [True] * 2
    assert (pairs.style_names[pairs.styles[-1]], pairs.identity_names[pairs.identities[-1]]) == ("solid", "id green square")
    assert pairs.prompts[-1] == "solid style, green square"
    assert np.array_equal(pairs.pictures[-1], np.asarray(shape("green square", "solid")))
    assert pairs.images([0]).aminmax() == (-1, 1)


def test_real_pictures_are_recognised_and_shuffled_ones_are_not(gallery):
    images = gallery.pairs.images(rows_of(gallery))
    table = judge_pictures(gallery, {"all": (images, rows_of(gallery))})["scores"]["all"]
    assert table["generated"] == {"pictures": 12, "top1": 1.0, "top5": 1.0, "style": 1.0, "top5_in_style": 1.0}
    assert table["augmented real"]["top1"] >= 0.75 and table["augmented real"]["style"] >= 0.75
    assert table["shuffled prompts"]["top1"] <= 0.4 and table["shuffled prompts"]["style"] <= 0.8


def test_the_ceiling_falls_with_the_strength_of_the_augmentation(gallery):
    rows = rows_of(gallery).repeat(20)
    none, mild, full = (augmented_scores(gallery, rows, 0, strength)["top1"] for strength in (0.0, 0.5, 1.0))
    assert none == 1.0 and mild > full > 1 / 6


@pytest.mark.parametrize(
    ("change", "top1", "style"),
    [
        (lambda style, thing: ("solid" if style == "line" else "line", thing), 1.0, 0.0),
        (lambda style, thing: (style, THINGS[THINGS.index(thing) - 2]), 0.0, 1.0),
    ],
    ids=["wrong style", "wrong thing"],
)
def test_identity_and_style_are_told_apart(gallery, change, top1, style):
    rows = chosen_rows(gallery, 99)
    prompts = {kind: [gallery.pairs.prompts[row] for row in part] for kind, part in rows.items()}
    drawn = {kind: (to_images(made), rows[kind]) for kind, made in draw(FakePipeline(change), prompts, 0, 4).items()}
    for score in (entry["generated"] for entry in judge_pictures(gallery, drawn)["scores"].values()):
        assert (score["top1"], score["style"]) == (top1, style)


def test_pictures_are_drawn_in_batches_in_the_order_of_the_prompts(gallery):
    rows = chosen_rows(gallery, 5)
    assert rows["seen"].tolist() == [0, 2, 4, 7, 9] and rows["held-out"].tolist() == [10, 11]
    pipeline = FakePipeline()
    prompts = {kind: [gallery.pairs.prompts[row] for row in part] for kind, part in rows.items()}
    made = draw(pipeline, prompts, 0, 2)
    assert pipeline.batches == [2, 2, 1, 2]
    assert all(np.array_equal(made[kind], gallery.pairs.pictures[part]) for kind, part in rows.items())


def test_ranks_count_the_identities_that_are_nearer(gallery):
    generator = torch.Generator().manual_seed(0)
    real, queries = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (12, 40))
    identities = torch.arange(40) % 6
    owners = gallery.pairs.identities.tolist()
    ranks = PictureIndex(gallery.net, gallery.pairs, real).ranks(queries, identities)
    for query, want, rank in zip(queries, identities, ranks, strict=True):
        best = {i: min(float((query - real[n]).norm()) for n in range(12) if owners[n] == i) for i in range(6)}
        assert int(rank) == sorted(best, key=best.get).index(int(want))


def test_a_judge_that_tells_nothing_apart_scores_nothing(gallery):
    blind = PictureIndex(gallery.net, gallery.pairs, torch.ones(12, 16) / 4)
    assert blind.ranks(torch.ones(3, 16) / 4, torch.tensor([0, 1, 5])).tolist() == [5, 5, 5]


def test_memorised_pictures_are_near_and_others_as_far_as_they_are(gallery):
    pairs = gallery.pairs
    assert nearest_training_distances(gallery, pairs.images([0, 3, 5])) == {
        "pictures": 3,
        "pixels": 0.0,
        "embedding": pytest.approx(0, abs=1e-3),
    }
    noise = torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    train = pairs.images(torch.arange(10))
    far = [min(float(((image - other) / 2).square().mean().sqrt()) for other in train) for image in noise]
    assert nearest_training_distances(gallery, noise)["pixels"] == pytest.approx(np.median(far), rel=1e-4)
    held_out = nearest_training_distances(gallery, pairs.images([10, 11]))
    assert held_out["pixels"] > 0.1 and held_out["embedding"] > 0.01


def test_the_table_has_every_row_and_its_protocol(gallery):
    rows = chosen_rows(gallery, 4)
    drawn = {kind: (gallery.pairs.images(part), part) for kind, part in rows.items()}
    table = judge_pictures(gallery, drawn, reconstruct=lambda images: torch.ones_like(images))
    assert table["scores"]["seen"]["reconstructed real"]["top1"] < 1
    lines = judge_markdown({"protocol": {"model": "m", "guidance_interval": None}, **table}).splitlines()
    assert "| generated | held-out | 2 | 100.0 % | 100.0 % | 100.0 % | 100.0 % |" in lines
    assert sum(line.startswith("| shuffled prompts |") for line in lines) == 2
    assert any(line.startswith("| real, held-out | 0.") for line in lines)
    assert lines[-1] == "model: m; guidance interval: None"


def test_save_and_load_give_the_same_judge(gallery, judge_folder, tmp_path):
    net = gallery.net
    net.save(tmp_path / "again")
    again = load_judge(tmp_path / "again")
    images = gallery.pairs.images(rows_of(gallery))
    assert all(torch.equal(a, b) for a, b in zip(embed(net, images), embed(again, images), strict=True))
    assert again.fingerprint() == net.fingerprint() and again.info == net.info
    assert net.info["augmented"]["held-out"]["pictures"] == 2 and net.info["training"]["pictures"] == 12
    assert json.loads((judge_folder / "run.json").read_text())["stage"] == "judge"
    (tmp_path / "again" / "hashes.json").unlink()
    (tmp_path / "again" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged, or not the weights"):
        load_judge(tmp_path / "again")


def test_folding_changes_nothing_but_that_it_can_be_saved(tmp_path):
    torch.manual_seed(0)
    net = JudgeNet(["a", "b"], STYLES, normed=True, **SMALL)
    images = torch.rand(4, 3, SIDE, SIDE) * 2 - 1
    net.train()(images)  # running statistics that are not those of the start
    with pytest.raises(ValueError, match="fold"):
        net.save(tmp_path)
    before = net.eval()(images)
    for a, b in zip(before, net.fold().train()(images), strict=True):
        assert torch.allclose(a, b, atol=1e-4) and a.std() > 1e-3


def test_training_is_a_function_of_the_seed(shapes):
    pairs = read_pairs(shapes)
    a, b, c = (fit_judge(pairs, steps=3, batch=6, seed=seed, **SMALL).fingerprint() for seed in (0, 0, 1))
    assert a == b != c


def test_augmentation(gallery):
    images = gallery.pairs.images(rows_of(gallery))
    once, again = (augment(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(once, again) and once.aminmax() == (-1, 1)
    assert ((once - images).abs().mean(dim=(1, 2, 3)) > 0.02).all()
    assert torch.allclose(augment(images, torch.Generator(), strength=0.0), images, atol=1e-5)
    # Away from the white around it what was painted in one primary colour keeps it
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(64, 3, SIDE, SIDE)
    middle = augment(red, torch.Generator().manual_seed(0))[:, :, 12:20, 12:20].mean(dim=(0, 2, 3))
    assert middle[0] > 0.5 > -0.5 > middle[1:].max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": None}, "line 1: has no style; pictures need a style and an identity"),
        ({"identity": 7}, "line 1: has no identity"),
        ({"file_name": "nothing.png"}, "nothing.png: cannot be read as an image"),
    ],
)
def test_data_that_is_not_pairs_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_pairs(write_shapes(tmp_path / "data", **changes))


def test_other_folders_and_sizes_are_refused(tmp_path, shapes, stripe_folder):
    with pytest.raises(UserError, match="has no train/metadata.jsonl"):
        read_pairs(stripe_folder)
    write_shapes(tmp_path / "data")
    Image.new("RGB", (16, 16)).save(tmp_path / "data" / "test" / "solid" / "green-square.png")
    with pytest.raises(UserError, match="green-square.png: is 16x16, other pictures of the data are not"):
        read_pairs(tmp_path / "data")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["model.depth=3"], "model.depth: unknown key; a judge has only widths"),
        (["strength=2"], "strength: input should be less than or equal to 1"),
        (["model.widths=[8,8]"], "model.widths: a judge has 4 stages, each at least 1 wide, got [8, 8]"),
        (["model.widths=5"], "model.widths: a judge has 4 stages, each at least 1 wide, got 5"),
        (["model.dim=wide"], "model.dim: must be a number of at least 1, got wide"),
        (["--resume"], "a judge trains in one go; leave --resume out and name a new folder"),
    ],
)
def test_configs_that_cannot_be_trained_are_refused(refused, shapes, tmp_path, override, message):
    path = write_yaml(tmp_path / "judge.yaml", judge_tree(shapes, tmp_path / "out"))
    assert message in refused("train", path, *override)


def test_a_judge_is_not_written_over(refused, shapes, judge_folder, tmp_path):
    path = write_yaml(tmp_path / "judge.yaml", judge_tree(shapes, judge_folder))
    assert f"output {judge_folder}: a judge trains in one go" in refused("train", path)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory, shapes) -> Path:
    """A model that reads text and draws 32x32 RGB, trained for next to no time."""
    root = tmp_path_factory.mktemp("text")
    data = {"data__size": [SIDE, SIDE], "data__channels": 3, "train__steps": 2}
    colour = {"model__config__in_channels": 3, "model__config__out_channels": 3}
    first = train(autoencoder_config(shapes, root / "first", **data, **colour))
    unet = {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    text = {"width": 16, "layers": 1, "heads": 2, "max_length": 12}
    changes = {"model__type": "UNet2DConditionModel", "model__config": unet, "condition": {"type": "text", "text": text}}
    return train(diffusion_config(shapes, root / "second", first, **data, **changes))


def test_the_command_draws_measures_and_writes(run, refused, here, text_model, shapes, judge_folder):
    command = ("judge", text_model, "--data", shapes, "--judge", judge_folder, "--num-prompts", "4", "--steps", "2")
    command += ("--batch-size", "3", "--guidance", "2", "--sampler", "euler")
    printed = run(*command, "--out", "out")
    table = json.loads(printed)
    assert [table["scores"][kind]["generated"]["pictures"] for kind in ("seen", "held-out")] == [4, 2]
    assert set(table["scores"]["seen"]) == {"generated", "augmented real", "reconstructed real", "shuffled prompts"}
    assert table["scores"]["seen"]["augmented real"]["top1"] > 0.5
    expected = {
        "sampler": "euler",
        "steps": 2,
        "guidance": 2.0,
        "seed": 0,
        "judge": load_judge(judge_folder).fingerprint()[:16],
    }
    assert table["protocol"].items() >= expected.items()
    assert sorted(p.name for p in Path("out").iterdir()) == ["grid.png", "judge.json", "judge.md", "metrics.json"]
    assert json.loads(Path("out/judge.json").read_text()) == table
    assert "judge: " + expected["judge"] in Path("out/judge.md").read_text()
    with Image.open("out/grid.png") as grid:
        assert grid.width >= 6 * 2 * SIDE and grid.height >= 4 * 2 * SIDE  # seen, held-out, and two rows of free prompts
    assert len(FREE_PROMPTS) == 12
    record, score = read_record("out"), table["scores"]["seen"]
    entry = record["values"]["top5[seen]"]
    assert entry == {
        "value": score["generated"]["top5"],
        "floor": score["augmented real"]["top5"],
        "images": 4,
        "floor_images": 4,
        "chance": score["shuffled prompts"]["top5"],
    }
    assert record["made"].items() >= {"steps": 2, "sampler": "euler", "guidance": 2.0, "seed": 0}.items()
    run(*command, "--seed", "1", "--out", "other")
    assert "top5_in_style[held-out]" in run("compare", "out", "other")
    run(*(3 if each == "4" else each for each in command), "--out", "fewer")
    assert "compare: seen_pairs is 4 in out and 3 in fewer" in refused("compare", "out", "fewer")
    (here / "odd.json").write_text(json.dumps(record | {"kind": []}))
    assert "odd.json: kind is []; valid are evaluate, judge" in refused("compare", "odd.json", "out")
    again = json.loads(run(*command, "--batch-size", "4"))
    for kind, entries in table["nearest_training_picture"].items():
        assert again["nearest_training_picture"][kind] == pytest.approx(entries, abs=1e-3)
    assert json.loads(run(*command, "--seed", "1"))["nearest_training_picture"] != table["nearest_training_picture"]


def test_the_command_refuses_what_it_cannot_judge(refused, tmp_path, text_model, shapes, judge_folder, stripe_folder):
    def say(model=text_model, data=shapes, judge=judge_folder, *more):
        return refused("judge", model, "--data", data, "--judge", judge, *more)

    classes = save(tmp_path / "classes", tiny_unet(), tiny_vae(), DDIMScheduler(), {}, ["a", "b", "c"], null_class=3)
    assert "reads no text" in say(classes)
    assert "has no train/metadata.jsonl" in say(data=stripe_folder)
    fewer = write_shapes(tmp_path / "fewer", THINGS[1:])
    assert "was trained on other pairs (6 identities in line, solid) than those of --data" in say(data=fewer)
    plain = write_shapes(tmp_path / "plain", text="a shape")
    assert "id blue circle has no caption of the form '<style> style, <name>'" in say(data=plain)
    assert "--num-prompts must be at least 2" in say(text_model, shapes, judge_folder, "--num-prompts", "1")
    assert "--sampler nope: unknown" in say(text_model, shapes, judge_folder, "--sampler", "nope")
    assert "model.safetensors" in say(judge=shapes)
    assert "nowhere" in say(judge="nowhere")


def test_pictures_of_another_size_are_refused(gallery, text_model):
    pipeline = load(text_model)
    _check_pictures(pipeline, LatentCodec(pipeline.vae), gallery.pairs)
    small = replace(gallery.pairs, pictures=gallery.pairs.pictures[:, ::2, ::2])
    with pytest.raises(UserError, match="the model's pictures are 32x32x3, those of --data .* are 16x16x3"):
        _check_pictures(pipeline, LatentCodec(pipeline.vae), small)


def test_a_judge_of_other_pictures_of_the_same_names_is_refused(refused, gallery, tmp_path, text_model, judge_folder):
    data = write_shapes(tmp_path / "data")
    Image.new("RGB", (SIDE, SIDE), "red").save(data / "train" / "solid" / "red-square.png")
    message = refused("judge", text_model, "--data", data, "--judge", judge_folder)
    recorded, current = gallery.net.info["data_fingerprint"][:12], read_pairs(data).fingerprint()[:12]
    assert (
        f"--judge {judge_folder}: was trained on data with fingerprint {recorded}, and --data {data} has {current}" in message
    )
    swapped = replace(gallery.pairs, held_out=gallery.pairs.held_out.flip(0))
    with pytest.raises(UserError, match="other pairs held out"):
        index_pictures(gallery.net, swapped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery.net, "info", {})  # one that keeps no record
        assert len(index_pictures(gallery.net, swapped).embeddings) == 12


def test_the_judge_that_ships_says_what_it_was_trained_on():
    net = load_judge(Path(__file__).parents[2] / "weights" / "emoji-judge")
    assert len(net.info["data_fingerprint"]) == 64 and net.info["training"]["pictures"] == 3822


def test_several_processes_judge_as_one(tmp_path, text_model, shapes, judge_folder):
    arguments = ("judge", text_model, "--data", shapes, "--judge", judge_folder, "--num-prompts", 4, "--steps", 2)
    arguments += ("--batch-size", 2, "--out")
    outs = {world: tmp_path / str(world) for world in (1, 2)}
    results = carry_out([command(*arguments, out, world=world) for world, out in outs.items()])
    for world, result in zip(outs, results, strict=True):
        assert result["codes"] == [0] * world, result["stderr"]
        assert json.loads(result["stdout"]) == json.loads((outs[world] / "judge.json").read_text())
    (one, table), (several, other) = ((tree(out), json.loads((out / "judge.json").read_text())) for out in outs.values())
    names = {"grid.png", "judge.json", "judge.md", "metrics.json"}
    assert {path.name for path in one} == {path.name for path in several} == names
    assert one[outs[1] / "grid.png"] == several[outs[2] / "grid.png"]  # which shows every picture
    assert (table["scores"], table["protocol"]) == (other["scores"], other["protocol"])
    for kind, entries in table["nearest_training_picture"].items():
        assert other["nearest_training_picture"][kind] == pytest.approx(entries, rel=1e-6)
