"""Text and class as a config names them: what is refused at once, what pictures show, the cached states, captions cut."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import autoencoder_config
from tiny_text import ENCODER, text_tree, write_bert, write_captioned

from latentdiff import checkpoints
from latentdiff.config import DiffusionConfig, load_config, parse_config
from latentdiff.data.captions import Captions, build_states
from latentdiff.errors import UserError
from latentdiff.models.text_encoder import ClassCondition, PromptEncoder, build_text_encoder, train_tokenizer
from latentdiff.training import train
from latentdiff.training.conditioning import Conditions, TextCondition, check

WORDS = "across blank down stripes a picture of"
TEXTS = ["a red apple", "a green apple", "grinning face", "blue heart"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(captioned data, a first stage trained on them)."""
    root = tmp_path_factory.mktemp("text")
    data = write_captioned(root / "data")
    return data, train(autoencoder_config(data, root / "autoencoder"))


def own_prompts(length: int = 12) -> PromptEncoder:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 400, length)
    return PromptEncoder(tokenizer, build_text_encoder(tokenizer, 16, 1, 2).eval())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"condition": {"type": "class", "text": ENCODER}},
            "condition.text.max_length: condition.type is class, .* not conditioned on text",
        ),
        ({"condition": {"type": "none", "text": {"encoder": "x"}}}, "condition.text.encoder: .* none, .*to text or class.text"),
        ({"condition": {"type": "class"}, "sample__prompts": ["stripes"]}, "sample.prompts: condition.type is class"),
        (
            {"condition__dropout": 0.2},
            "condition.dropout: condition.type is text, .* not conditioned on class; .* by condition.text.dropout",
        ),
        ({"condition": {"type": "none", "dropout": 0}}, "condition.dropout: condition.type is none, .*to class or class.text$"),
        ({"condition__text__dropout": 1}, "condition.text.dropout: 1 drops every caption, .* below 1"),
        ({"condition": {"type": "class", "dropout": 1.0}}, "condition.dropout: 1 drops every class, .* below 1"),
        (
            {"condition__text": {**ENCODER, "dropout": 0}, "sample__prompts": ["stripes", " "]},
            "sample.prompts: an empty prompt stands for no text",
        ),
    ],
)
def test_what_a_condition_would_ignore_or_never_learn_is_refused_before_anything_is_written(runs, tmp_path, changes, said):
    data, autoencoder = runs
    with pytest.raises(UserError, match=said):
        train(parse_config(text_tree(data, tmp_path / "run", autoencoder, **changes)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["class", "text", "class+text", "none"])
def test_the_configs_that_ship_and_what_run_json_writes_out_pass(kind):
    root, count = Path(__file__).parents[2] / "configs", 0
    for path in root.rglob("*.yaml"):
        if isinstance(config := load_config(path), DiffusionConfig):
            check(config)
            count += 1
    assert count >= 5
    config = load_config(root / "folder" / "diffusion.yaml", [f"condition.type={kind}"])
    check(parse_config(config.model_dump(mode="json")))  # every key is set in it


def test_an_empty_prompt_is_drawn_as_the_unconditional_picture(runs, tmp_path, monkeypatch):
    data, autoencoder = runs
    learnt, drawn = train_tokenizer(WORDS.split(), 400, 12), {}
    monkeypatch.setattr("latentdiff.training.conditioning.train_tokenizer", lambda *_: learnt)  # learnt anew it differs
    for prompt in ("", "down stripes"):
        for guidance in (1.0, 30.0):
            changes = {"sample__prompts": [prompt], "sample__guidance": guidance, "train__steps": 1, "ema__decay": 0.0}
            output = tmp_path / f"{len(drawn)}"
            config = parse_config(text_tree(data, output, autoencoder, cache__folder=str(tmp_path / "latents"), **changes))
            assert checkpoints.load(train(config)).config.default_guidance_scale == guidance
            drawn[prompt, guidance] = np.asarray(Image.open(output / "pictures" / "step-000001.png")).astype(int)
    assert np.array_equal(drawn["", 1.0], drawn["", 30.0])
    assert np.abs(drawn["down stripes", 1.0] - drawn["down stripes", 30.0]).max() > 0


def test_pictures_of_class_and_text_show_a_caption_of_the_class(runs, tmp_path, monkeypatch):
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

    asked: list[tuple] = []
    real = LatentDiffusionPipeline.__call__

    def spy(self, prompt=None, class_labels=None, **call):
        asked.append((prompt, [self.class_names[k] for k in class_labels]))
        return real(self, prompt=prompt, class_labels=class_labels, **call)

    monkeypatch.setattr(LatentDiffusionPipeline, "__call__", spy)
    data, order = write_captioned(tmp_path / "data"), {"across": "z", "blank": "x", "down": "y"}  # not that of the files
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines = [{**line, "label": order[line["label"]]} for line in lines]
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"condition__type": "class+text", "train__steps": 1, "cache__folder": str(tmp_path / "latents")}
    train(parse_config(text_tree(data, tmp_path / "own", runs[1], **changes)))
    train(parse_config(text_tree(data, tmp_path / "named", runs[1], sample__prompts=["a", "b"], **changes)))
    assert asked == [(["blank stripes", "down stripes", "across stripes"], ["x", "y", "z"]), (["a", "b"], ["x", "y"])]


def test_a_class_without_training_images_is_shown_with_the_caption_of_any():
    captions = Captions([("x", "y"), ("z",)])
    told = Conditions(ClassCondition(3), torch.tensor([2, 0]), TextCondition(captions, 0.1, own_prompts(), {}))
    assert told.example_captions([0, 1, 2]) == ["z", "x", "x"]
    assert Conditions(None, None, told.text).example_captions([None, None, None]) == ["x", "z"]
    with pytest.raises(ValueError, match="not conditioned on text"):
        Conditions(None, None, None).example_captions([None])


def test_a_run_is_resumed_with_its_states_in_another_folder(runs, tmp_path):
    data, autoencoder = runs
    bert = str(write_bert(tmp_path / "bert", WORDS))

    def run(folder: str, steps: int, resume: bool = False) -> Path:
        changes = {"condition__text": {"encoder": bert, "folder": str(tmp_path / folder)}, "train__steps": steps}
        return train(parse_config(text_tree(data, tmp_path / "run", autoencoder, **changes)), resume=resume)

    run("here", 1)
    run("there", 2, resume=True)
    first, second = (load_file(tmp_path / folder / "shard-00000.safetensors") for folder in ("here", "there"))
    assert torch.equal(first["states"], second["states"]) and checkpoints.read_meta(tmp_path / "run" / "model")["steps"] == 2


def test_stale_states_are_refused_as_what_they_are(tmp_path):
    captions = Captions([tuple(TEXTS)])
    build_states(own_prompts(12), captions, tmp_path / "c")
    cases = {
        "condition.text.max_length (12, now 10)": (own_prompts(10), captions),
        "number of captions (5, now 6)": (own_prompts(12), Captions([(*TEXTS, "more")])),
    }
    for said, (prompts, wanted) in cases.items():
        with pytest.raises(UserError) as error:
            build_states(prompts, wanted, tmp_path / "c")
        assert str(error.value).startswith(f"{tmp_path / 'c'}: these caption states were made with other ")
        assert said in str(error.value) and "latents" not in str(error.value) and "images" not in str(error.value)
        assert str(error.value).endswith("use another condition.text.folder, or delete this one")


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, torch.float16), (1e6, torch.float32)])
def test_states_beyond_float16_are_kept_whole(tmp_path, scale, dtype):
    prompts, captions = own_prompts(), Captions([tuple(TEXTS)])
    prompts.encoder.final_layer_norm.weight.data *= scale
    states = build_states(prompts, captions, tmp_path / "c", batch=2)
    expected = prompts.states(captions.distinct)
    assert load_file(tmp_path / "c" / "shard-00000.safetensors")["states"].dtype == dtype
    assert (expected.abs().max() > 65504) == (dtype == torch.float32)
    torch.testing.assert_close(states[torch.arange(5)], expected, atol=2e-3, rtol=1e-3)


def test_a_caption_without_finite_states_is_named(tmp_path):
    prompts = own_prompts()
    token = prompts.tokenizer("blue")["input_ids"][1]
    prompts.encoder.get_input_embeddings().weight.data[token] = torch.inf
    with pytest.raises(UserError, match="condition.text.encoder: gives no finite states of the caption 'blue heart'"):
        build_states(prompts, Captions([tuple(TEXTS)]), tmp_path / "c")
    assert not (tmp_path / "c").exists()  # the folder was made for nothing, and went with its lock


@pytest.mark.parametrize("frozen", [False, True])
def test_captions_that_are_cut_are_counted_once(runs, tmp_path, capsys, frozen):
    data, autoencoder = runs
    encoder = {"encoder": str(write_bert(tmp_path / "bert", WORDS))} if frozen else ENCODER
    changes = {"train__steps": 1, "cache__folder": str(tmp_path / "latents")}
    # 36 training images of three captions each; "a picture of CLASS" has 4 words, start and end around them
    warning = "warning: 36 of 108 captions are longer than 5 tokens and are cut (condition.text.max_length)"
    for length, said in ((5, [warning]), (6, [])):
        changes["condition__text"] = {**encoder, "max_length": length}
        train(parse_config(text_tree(data, tmp_path / f"run{length}", autoencoder, **changes)))
        assert [line for line in capsys.readouterr().err.splitlines() if "captions are" in line] == said
