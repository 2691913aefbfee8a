"""Which device commands use, that models are moved to it, and that noise does not depend on it."""

import copy

import pytest
import torch
from stripes import CLASSES

from latentdiff import generation
from latentdiff.checkpoints import load
from latentdiff.evaluation import evaluate, feature_cache, judge, metrics
from latentdiff.generation import image_generators
from latentdiff.models.judge_net import JudgeNet
from latentdiff.utils import processes
from latentdiff.utils.random import generators, randn_like

META = torch.device("meta")


class Enough(Exception):
    """The rest of a command would need numbers, which the meta device has none of."""


@pytest.fixture
def two_accelerators(monkeypatch):
    """As torch reports them."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def on_meta(monkeypatch):
    """Commands take the meta device for what there is."""
    monkeypatch.setattr(processes, "pick_device", lambda name="auto": META)


def test_what_torch_reports_is_taken(two_accelerators, monkeypatch):
    pick = processes.pick_device
    assert pick() == pick("cuda") == pick("cuda:0") == torch.device("cuda:0")
    assert pick("cuda:1") == torch.device("cuda:1") and pick("cpu") == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, own in ((0, 0), (1, 1), (2, 0)):  # each process has its own, as far as there are enough
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert pick() == pick("cuda") == torch.device("cuda", own) and pick("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert pick() == torch.device("cpu") and pick("cuda:1") == torch.device("cuda:1")


def test_without_an_accelerator_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))  # built for, and not there
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert processes.pick_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["meta", "cuda:2", "mps", "nonsense", ""])
def test_absent_devices_are_refused_by_every_command(refused, two_accelerators, name):
    said = f"latentdiff: --device {name}: is no device of this machine; valid: auto, cpu, cuda, cuda:0, cuda:1"
    shipped = ("--features", "weights/fashion-mnist-features", "--data", "nowhere")
    assert refused("generate", "Bag", "--device", name) == said
    assert refused("evaluate", "weights/fashion-mnist", *shipped, "--device", name) == said
    assert refused("judge", "nowhere", "--data", "nowhere", "--judge", "nowhere", "--device", name) == said


def test_the_cpu_can_be_asked_for(run, model, two_accelerators):
    call = ("generate", CLASSES[0], "--model", model, "--num-images", "1", "--steps", "1", "--out")
    assert run(*call, "cpu.png", "--device", "cpu") == "cpu.png\n"


def places(module: torch.nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def test_generate_moves_the_pipeline(model, here, monkeypatch, on_meta):
    def look(pipeline, *args, **kwargs):
        assert places(pipeline.unet) == places(pipeline.vae) == {"meta"} and pipeline.device == META
        raise Enough

    monkeypatch.setattr(generation, "generate_batches", look)
    with pytest.raises(Enough):
        generation.generate(model, [CLASSES[0]], progress=False)


def test_evaluate_moves_the_pipeline_and_the_feature_network(model, stripe_folder, feature_folder, monkeypatch, on_meta):
    seen = []

    def make(pipeline, wanted, **call):
        seen.append(places(pipeline.unet) | places(pipeline.vae))
        return torch.zeros(wanted.total, 16, 16, 1).byte().numpy()

    def see(net, *_):
        assert places(net) == {"meta"}
        return net

    def measure(images, labels, train, test, net, *, codec, reference, **options):
        assert reference is net and places(codec.vae) == {"meta"}
        raise Enough

    monkeypatch.setattr(evaluate, "_make", make)
    monkeypatch.setattr(feature_cache, "reference_statistics", see)
    monkeypatch.setattr(metrics, "evaluate_samples", measure)
    with pytest.raises(Enough):
        evaluate.evaluate(model, str(stripe_folder), 6, features=feature_folder)
    assert seen == [{"meta"}]


def test_judge_moves_the_pipeline_and_the_judge(monkeypatch, on_meta, model):
    pipeline = load(model)
    pipeline.register_modules(text_encoder=copy.deepcopy(pipeline.vae))  # it need not read
    net = JudgeNet(["a thing"], ["a style"], (8, 8), 4)

    def index_pictures(net, pairs, name):
        assert places(net) == places(pipeline.unet) == places(pipeline.vae) == places(pipeline.text_encoder) == {"meta"}
        raise Enough

    monkeypatch.setattr("latentdiff.checkpoints.load", lambda folder: pipeline)
    monkeypatch.setattr("latentdiff.checkpoints.resolve_model", lambda name, *rest: name)
    monkeypatch.setattr("latentdiff.models.judge_net.load_judge", lambda folder: net)
    monkeypatch.setattr("latentdiff.evaluation.retrieval.index_pictures", index_pictures)
    monkeypatch.setattr("latentdiff.data.pairs.read_pairs", lambda data: None)
    with pytest.raises(Enough):
        judge.judge(model, "data", "judge")


def test_a_device_without_float64_is_for_the_scheduler_alone(model, monkeypatch):
    monkeypatch.setattr(processes, "pick_device", lambda name="auto": torch.device("cpu") if name == "cpu" else META)
    monkeypatch.setattr(processes, "holds_float64", lambda device: device.type == "cpu")
    assert generation.place(load(model), "auto") == generation.place(load(model), "mps") == META
    for name in ("auto", "cpu"):
        assert generation.place(load(model), name, "euler") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device mps: has no float64, which latentdiff's samplers need; valid: auto, cpu"):
        generation.place(load(model), "mps", "euler")


def test_on_a_cpu_the_layout_is_that_of_fast_convolutions_and_the_images_are_the_same(model):
    plain, placed = load(model), load(model)
    generation.place(placed, "cpu")
    for network in (placed.unet, placed.vae):
        layouts = [p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.dim() == 4]
        assert layouts and all(layouts)
    images = [pipe(class_labels=[0, 1], generator=generators(3, range(2)), output_type="pt").images for pipe in (plain, placed)]
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-4)


def test_noise_is_drawn_on_the_cpu_for_every_device(model, monkeypatch):
    pipeline, draws, randn = load(model), [], torch.randn

    def record(*args, **kwargs):
        draws.append(randn(*args, **kwargs))
        return draws[-1]

    expected = pipeline.prepare_latents(3, image_generators(0, 1, 0, 3), None)
    steps = randn_like(expected, image_generators(0, 2, 0, 3))
    pipeline.to(META)
    monkeypatch.setattr(torch, "randn", record)
    assert pipeline.prepare_latents(3, image_generators(0, 1, 0, 3), None).device == META
    assert torch.equal(torch.cat(draws), expected)
    draws.clear()
    assert randn_like(expected.to(META), image_generators(0, 2, 0, 3)).device == META
    assert torch.equal(torch.stack(draws), steps)
