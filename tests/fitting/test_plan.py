"""What a fit decides: for odd folders, short and long times, other machines and words of the user."""

from types import SimpleNamespace

import pytest
import yaml
from tiny_runs import write_stripes

from latentdiff.config import load_config
from latentdiff.errors import UserError
from latentdiff.fitting.facts import Facts
from latentdiff.fitting.machine import Machine, Timing
from latentdiff.fitting.plan import choose_data, make_plan, sort_overrides, write_configs

CPU = Machine("cpu", "a processor", 2, 2, 8 << 30, False)
GPU = Machine("cuda:0", "a GPU", 8, 8, 80 << 30, True)
VAE = "weights/emoji/vae"
WIDTHS = {96: 1.0, 128: 2.5, 160: 2.5, 256: 8.0}  # first channels of a size: its time, relative to that of small


@pytest.fixture(autouse=True)
def _encoding_takes_a_millisecond(monkeypatch):
    monkeypatch.setattr("latentdiff.fitting.plan.time_encoding", lambda codec, size: 1e-3)


def facts(images=600, **changes) -> Facts:
    plain = {"smallest": [64, 64], "median": [64, 64], "largest": [64, 64], "classes": {"a": images // 2, "b": images // 2}}
    return Facts("a-folder", images, **(plain | changes))


def verdict(decision="skip"):
    return SimpleNamespace(where=VAE, decision=decision, reason="28 dB", normaliser="measured")


def at_speed(seconds):
    """A measurement that finds this time of a step of the small U-Net, and times in proportion for the others."""

    def measure(config, trial, device, precision, patience):
        widths = config.model.config.get("block_out_channels", [96])
        return Timing("float32", seconds * WIDTHS.get(widths[0], 1.0), config.train.batch_size)

    return measure


def plan(hours=0.5, speed=0.1, overrides=(), found=None, kind="skip", machine=CPU, **options):
    seen = found or facts()
    return make_plan(
        seen, machine, hours, verdict(kind) if kind else None, overrides, measure=at_speed(speed), out="runs/x", **options
    )


def test_phases_fill_the_hours():
    for hours in (0.1, 0.5, 4.0):
        for kind in ("skip", "decoder", None):
            seconds = plan(hours, kind=kind).seconds
            assert sum(seconds.values()) == pytest.approx(3600 * hours, abs=1.0)
            assert seconds["choose"] + seconds["report"] >= 40
            assert (seconds["autoencoder"] > 0) == (kind != "skip")


def test_more_time_and_pictures_give_a_larger_network():
    assert plan(0.1).size == "small"
    assert plan(2.0).size == "medium"
    assert plan(12.0).size == "medium"  # a large one would remember 600 pictures
    assert plan(12.0, speed=0.03, found=facts(20_000)).size == "large"
    assert plan(0.5, speed=2.0).size == "small"


def test_without_hours_the_plan_names_some():
    slow, fast = plan(None, speed=0.5), plan(None, speed=0.05)
    assert 0.25 <= fast.hours < slow.hours <= 12 and "none were given" in slow.reasons["hours"]
    assert f"0.1 hours are short: {slow.hours:g} would suit" in " ".join(plan(0.1, speed=0.5).notes)
    assert not any("are short" in note for note in plan(slow.hours, speed=0.5).notes)


def test_configs_are_written_and_read(tmp_path):
    for kind in ("skip", "decoder", None):
        made = plan(kind=kind)
        files = write_configs(made, tmp_path / str(kind))
        assert [load_config(file) for file in files] == [each for each in (made.autoencoder, made.diffusion) if each]
        assert files[0].read_text().startswith("# ")
    assert made.diffusion.autoencoder == "runs/x/autoencoder" and made.autoencoder.output == "runs/x/autoencoder"


def test_an_encoder_that_is_kept_keeps_its_normaliser():
    assert [plan(kind=kind).diffusion.normaliser for kind in ("skip", "decoder", None)] == ["measured", "measured", "stored"]


def test_conditions_follow_the_folder():
    captions = {"captions": 9, "distinct": 9, "without": 0}
    assert plan().diffusion.condition.type == "class"
    assert plan(found=facts(classes={})).diffusion.condition.type == "none"
    text = plan(found=facts(captions=captions)).diffusion
    assert text.condition.type == "class+text" and text.model.type == "UNet2DConditionModel"


def test_icons_are_shown_whole_on_a_ground_where_they_are_seen():
    clear = {"transparent": 1.0, "hidden": {"white": 0.2, "black": 0.0, "grey": 0.0}}
    data, reasons = choose_data(facts(**clear), CPU, 0.5)
    assert (data.framing, data.background, data.flips) == ("letterbox", (0, 0, 0), False)
    assert "20%" in reasons["background"]
    clear["hidden"] = {"white": 0.01, "black": 0.5, "grey": 0.0}
    assert choose_data(facts(**clear), CPU, 0.5)[0].background == (255, 255, 255)


def test_photographs_of_one_shape_are_cropped_and_others_not():
    assert choose_data(facts(aspect=[1.4, 1.5, 1.5], cropped=0.33), CPU, 1)[0].framing == "crop"
    assert choose_data(facts(aspect=[0.7, 1.0, 1.5], cropped=0.2), CPU, 1)[0].framing == "letterbox"


def test_sizes_follow_pictures_time_and_machine():
    def side(machine, hours, median):
        return choose_data(facts(median=[median, median]), machine, hours)[0].size[0]

    assert side(CPU, 0.5, 16) == side(CPU, 0.05, 500) == 32
    assert side(CPU, 0.5, 500) == side(GPU, 1, 64) == 64
    assert side(GPU, 1, 500) == 128


def test_words_of_the_user_win():
    words = ["data.size=[32,32]", "train.batch_size=8", "optimizer.lr=0.001", "ema.decay=0.5", "stage1.loss.l1=2"]
    made = plan(overrides=words, kind=None)
    assert made.diffusion.data.size == made.autoencoder.data.size == (32, 32)
    assert (made.diffusion.train.batch_size, made.diffusion.optimizer.lr, made.diffusion.ema.decay) == (8, 0.001, 0.5)
    assert made.autoencoder.loss.l1 == 2
    assert sort_overrides(["autoencoder=train"]).autoencoder == "train"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.batchsize=3", "did you mean 'batch_size'"),
        ("data.sze=[3,3]", "did you mean 'size'"),
        ("stage1.loss.l3=1", "stage1: loss.l3: unknown key; did you mean"),
        ("trian.steps=3", "did you mean 'train'"),
        ("output=x", "give --out DIR"),
        ("data.source=x", "it is FOLDER"),
        ("train.steps", "key=value"),
    ],
)
def test_wrong_words_are_one_line_with_the_nearest(word, says):
    with pytest.raises(UserError) as caught:
        sort_overrides([word])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_large_pictures_need_an_autoencoder_of_their_own():
    with pytest.raises(UserError, match="autoencoder="):
        choose_data(facts(), CPU, 1, ["data.size=[256,256]"])
    assert choose_data(facts(), CPU, 1, ["data.size=[256,256]", f"autoencoder={VAE}"])[0].size == (256, 256)


def test_of_too_many_pictures_for_the_time_a_part_is_trained_on():
    made = plan(0.1, found=facts(10_000_000))
    limit = made.diffusion.data.limit
    assert 50 <= limit < 10_000_000 and f"{limit} of the 10000000" in made.reasons["limit"]
    assert plan(0.1, found=facts(10_000_000), overrides=["data.limit=70"]).diffusion.data.limit == 70
    assert plan(0.5).diffusion.data.limit is None


def test_a_base_keeps_its_network_and_autoencoder():
    base = {"autoencoder": VAE, "model": {"pretrained": "weights/emoji"}, "schedule": {"name": "cosine"}}
    base |= {"condition": {"type": "text"}, "prediction": "v_prediction"}
    captions = {"captions": 9, "distinct": 9, "without": 0}
    made = plan(found=facts(classes={}, captions=captions), base=base)
    assert made.size is None and made.diffusion.model.pretrained == "weights/emoji" and not made.diffusion.model.config


def test_a_real_folder_is_planned_and_timed(tmp_path):
    """The step of the smallest U-Net is timed for real."""
    from latentdiff.fitting.facts import look
    from latentdiff.fitting.machine import measure

    seen = look(str(write_stripes(tmp_path / "stripes", 30)))
    small = "model.config.block_out_channels=[32,32]"
    made = make_plan(seen, measure(), 0.1, verdict(), [small], out=tmp_path)
    assert made.diffusion.data.size == (32, 32) and made.steps["diffusion"] > 10
    assert all("\n" not in line for line in made.lines()) and 8 <= len(made.lines()) <= 20
    assert yaml.safe_load((write_configs(made, tmp_path)[0]).read_text())["stage"] == "diffusion"


def test_copies_and_dropout_wait_until_a_picture_is_seen_often():
    """400 passes over the pictures for each copy: few steps are not spent on what nobody has learnt by heart."""
    copies = {}
    for hours in (0.1, 0.5, 1.0, 4.0):
        made = plan(hours, speed=0.04, found=facts(600))
        data, passes = made.diffusion.data, made.steps["diffusion"] * made.diffusion.train.batch_size / 510
        copies[hours] = data.copies
        assert data.copies == min(6, max(1, round(passes / 400)))
        assert (data.shift > 0) == (data.zoom > 0) == (data.copies > 1) == ("copies" in made.reasons)
        assert made.diffusion.model.config.get("dropout", 0.0) == (0.1 if data.copies > 1 else 0.0)
    assert copies[0.1] == 1 < copies[0.5] < copies[1.0]
    asked = plan(0.1, found=facts(600), overrides=["data.shift=0.02", "model.config.dropout=0.3"]).diffusion
    assert asked.data.copies == 6 and asked.data.shift == 0.02 and asked.model.config["dropout"] == 0.3


def test_small_folders_get_copies_that_fit_the_time():
    made = plan(4.0, found=facts(300))
    assert made.diffusion.data.copies == 8 and made.diffusion.data.shift > 0 and "copies" in made.reasons
    assert plan(found=facts(10_000)).diffusion.data.copies == 1
    alone = plan(overrides=["data.copies=1"], found=facts(600)).diffusion.data
    assert (alone.copies, alone.shift, alone.zoom) == (1, 0, 0)


def test_the_clock_ends_both_stages():
    made = plan(0.5, kind=None)
    for name, config in (("autoencoder", made.autoencoder), ("diffusion", made.diffusion)):
        train = config.train
        assert train.minutes == pytest.approx(made.seconds[name] / 60, abs=0.01)
        assert train.steps > made.steps[name] and config.optimizer.schedule == "wsd"
        assert train.save_minutes <= 2 and train.picture_minutes <= 5
    assert made.diffusion.train.snapshot_minutes * 4 < made.diffusion.train.minutes


def test_pictures_of_many_classes_do_not_take_the_time():
    many = plan(0.1, speed=0.5, found=facts(800, classes={f"c{i}": 4 for i in range(200)}))
    few = plan(0.1, speed=0.1)
    assert many.diffusion.sample.per_class == 1 and few.diffusion.sample.per_class == 4
    assert many.diffusion.train.picture_minutes > 5 > few.diffusion.train.picture_minutes


def test_the_batch_suits_few_pictures_and_several_processes():
    assert plan(found=facts(600)).diffusion.train.batch_size == 32
    assert plan(found=facts(3), overrides=["data.copies=1"]).diffusion.train.batch_size == 4
    three = Machine("cpu", "a processor", 2, 2, 8 << 30, False, processes=3)
    made = plan(machine=three, kind=None)
    assert made.diffusion.train.batch_size % 3 == 0 and made.autoencoder.train.batch_size % 3 == 0
