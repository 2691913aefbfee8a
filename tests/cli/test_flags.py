"""Flags come from the functions' signatures: all those of before the move, their values, and one line for a mistake."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import latentdiff
from latentdiff.cli.commands import COMMANDS, load
from latentdiff.cli.flags import PYTHON_ONLY, parse
from latentdiff.errors import UserError
from latentdiff.utils.deprecation import renamed

# Of each command: its flags as they were typed by hand, at 3b47b87
BEFORE = json.loads(Path(__file__).with_name("flags_before.json").read_text())
# Defaults of today that are others: the feature network follows the images' channels
CHANGED = {(command, "--features"): {"default": None} for command in ("evaluate", "compare", "tune")}
CHANGED[("likelihood", "--rtol")] = {"default": None}  # 0.01, where the model has an ODE
FLAGS = [(command, flag) for command, flags in BEFORE.items() for flag in flags]
# Words to type as a value, and what they mean
VALUES = {"str": ("é 1", "é 1"), "int": ("-7", -7), "float": ("-1e-3", -0.001)}


def arguments(command: str, *tokens: str) -> dict:
    return parse(command, COMMANDS[command], tokens)[1]


def required(command: str, but: str = "") -> list[str]:
    """Tokens for what a command does not run without."""
    tokens = []
    for flag, about in BEFORE[command].items():
        if flag.startswith("--"):
            tokens += [flag, "x"] if about.get("required") and flag != but else []
        elif about["values"] in (1, "+") and flag != but:
            tokens.insert(0, "emoji" if (command, flag) == ("prepare", "name") else "x")
    return tokens


def meaning(command: str, flag: str, bound: dict):
    """What the function gets for a flag: its argument, or the default of its signature."""
    name = flag.removeprefix("--").replace("-", "_")
    if name == "no_verify":
        return bound.get(name, False)
    default = inspect.signature(load(COMMANDS[command].function)).parameters[name].default
    return bound.get(name, None if default is inspect.Parameter.empty else default)


def test_commands_of_before_are_still_there():
    assert [command for command in COMMANDS if command in BEFORE] == list(BEFORE)


@pytest.mark.parametrize(("command", "flag"), FLAGS, ids=lambda word: word)
def test_a_flag_of_before_has_its_default(command, flag):
    about = BEFORE[command][flag] | CHANGED.get((command, flag), {})
    found = meaning(command, flag, arguments(command, *required(command)))
    if about.get("required") or (not flag.startswith("--") and about["values"] in (1, "+")):
        assert found in ("x", ["x"], "emoji")
    elif about["default"] in (None, []) and about["default"] is not False:
        assert found in (None, (), [])
    else:
        assert (list(found) if isinstance(found, tuple) else found) == about["default"]
        assert type(found) in (tuple, type(about["default"]))


@pytest.mark.parametrize(("command", "flag"), FLAGS, ids=lambda word: word)
def test_a_flag_of_before_takes_its_values(command, flag):
    about, rest = BEFORE[command][flag], required(command, but=flag)
    if about["type"] == "flag":
        assert meaning(command, flag, arguments(command, *rest, flag)) is True
        return
    word, value = VALUES[about["type"]]
    if (command, flag) == ("prepare", "name"):
        word = value = "emoji"
    words, values = [word], value
    if about["values"] == 2:
        words, values = [word, "2"], (value, 2)
    elif about["values"] in ("*", "+"):
        words, values = [word, "2", word], [value, type(value)(2), value]
    if not flag.startswith("--"):
        first = [flag for flag in BEFORE[command] if not flag.startswith("--")].index(flag) == 0
        tokens = [*words, *rest] if first else [rest[0], *words, *rest[1:]]
        assert meaning(command, flag, arguments(command, *tokens)) == values
        return
    assert meaning(command, flag, arguments(command, *rest, flag, *words)) == values
    if about["values"] == 1:
        assert meaning(command, flag, arguments(command, *rest, f"{flag}={word}")) == value
        if about["type"] == "str":
            assert meaning(command, flag, arguments(command, *rest, flag, "")) == ""
            assert meaning(command, flag, arguments(command, *rest, f"{flag}=--x")) == "--x"
            assert meaning(command, flag, arguments(command, *rest, flag, "none")) == "none"
        again = [flag, "5", flag, word]  # the last one counts
        assert meaning(command, flag, arguments(command, *rest, *again)) == value


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_has_a_description(command):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        done = subprocess.run([sys.executable, "-m", "latentdiff", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert not any(f"[default: {value}]" in done.stdout for value in (None, False, ()))
    function = load(COMMANDS[command].function)
    documented = inspect.getdoc(function)
    if COMMANDS[command].flags_of:
        documented += inspect.getdoc(load(COMMANDS[COMMANDS[command].flags_of].function))
        assert "adaptive projected guidance" in done.stdout
    for name in inspect.signature(function).parameters:
        assert f"\n    {name}: " in documented, name
        assert name in PYTHON_ONLY or name.upper() in done.stdout or f"--{name.replace('_', '-')}" in done.stdout
    assert "--no-" not in done.stdout.replace("--no-verify", "") and "--empty" not in done.stdout


def test_values_may_look_like_flags_numbers_or_nothing():
    assert arguments("generate", "7segment", "0", "")["what"] == ["7segment", "0", ""]
    assert arguments("generate", "--steps", "3", "--", "--odd", "-x")["what"] == ["--odd", "-x"]
    assert arguments("agreement", "m", "--data", "d", "--log-snrs", "-6", "-4", "0")["log_snrs"] == [-6, -4, 0]
    options = arguments("generate", "--sampler-options", "eta=0.5", "s_churn=-1", "--sampler", "euler")
    assert options["sampler_options"] == ["eta=0.5", "s_churn=-1"] and options["sampler"] == "euler"
    options = arguments("generate", "--guidance-interval", "0.1", "0.6", "Bag")
    assert options["guidance_interval"] == (0.1, 0.6) and options["what"] == ["Bag"]
    assert arguments("tune", "m", "--data", "[1, 2]", "--samplers", '["a"]')["samplers"] == ['["a"]']


@pytest.mark.parametrize("command", ["train", "encode", "info"])
def test_overrides_stand_anywhere(command):
    option = {"train": ["--resume"], "encode": ["--part", "1/2"], "info": ["--no-verify"]}[command]
    expected = ["a=1", "b={c: [1, -2]}"]
    for tokens in (
        ["x.yaml", *expected, *option],
        ["x.yaml", *option, *expected],
        ["x.yaml", expected[0], *option, expected[1]],
        [*option, "x.yaml", *expected],
    ):
        found = arguments(command, *tokens)
        assert found["overrides"] == expected and "x.yaml" in found.values()
        assert found.get("resume") or found.get("part") == "1/2" or found["no_verify"]


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        (["generate", "--num-images", "many"], "--num-images 'many': give a whole number"),
        (["generate", "--num-images", "3.7"], "--num-images '3.7': give a whole number"),
        (["generate", "--num-images", "none"], "--num-images 'none': give a whole number"),
        (["generate", "--steps", "none"], "--steps 'none': give a whole number"),
        (["generate", "--guidance", "none"], "--guidance 'none': give a number"),
        (["generate", "--guidance", "strong"], "--guidance 'strong': give a number"),
        (["generate", "--guidance-interval", "0.1"], "--guidance-interval: give 2 values"),
        (["generate", "--guidance-interval", "0.1", "x"], "--guidance-interval 'x': give a number"),
        (["generate", "--steps"], "--steps: give a value"),
        (["generate", "--negative", "--steps", "3"], "--negative: give a value"),
        (["generate", "--stpes", "3"], "--stpes: unknown option; did you mean --steps?"),
        (["generate", "--num", "3"], "--num: unknown option; did you mean --num-images?"),
        (["generate", "--no-all-classes"], "--no-all-classes: unknown option"),
        (["train", "c.yaml", "--resume=maybe"], "--resume 'maybe': give true or false, or no value"),
        (["generate", "--what", "x"], "--what: unknown option"),
        (["generate", "--progress"], "--progress: unknown option"),
        (["generate", "-x"], "-x: unknown option"),
        (["publish", "run", "--no-verify"], "--no-verify: unknown option"),
        (["compare", "m", "--steps", "5", "ten"], "--steps 'ten': give a whole number"),
        (["compare", "m", "--samplers", "--data", "d"], "--samplers: give a value"),
        (["compare", "m", "--samplers", "a", "--samplers", "b"], "--samplers: given twice; give it once, with all its values"),
        (["train", "c.yaml", "--steps", "3"], "--steps: unknown option; a key of the config is written without dashes"),
        (["train"], "CONFIG: missing; give a YAML file"),
        (["reconstruct", "m"], "IMAGES: missing; give "),
        (["tune", "m"], "--data: missing; give a data set: a folder"),
        (["tune", "m", "--data"], "--data: give a value"),
        (["tune", "m", "n", "--data", "d"], "'n': one argument too many"),
        (["prepare", "emojis", "--out", "o"], "NAME 'emojis': valid: emoji"),
    ],
    ids=lambda words: words if isinstance(words, str) else " ".join(words),
)
def test_a_mistake_names_the_flag_and_what_is_valid(tokens, line):
    command, *rest = tokens
    with pytest.raises(UserError) as error:
        arguments(command, *rest)
    assert str(error.value).startswith(line) and str(error.value).endswith(f"(see latentdiff {command} --help)")


def test_public_names_are_what_the_commands_call():
    names = {"encode": "encode_dataset", "likelihood": "measure_likelihood", "import": "import_checkpoint"}
    for name, command in COMMANDS.items():
        assert getattr(latentdiff, names.get(name, name)) is load(command.function)
    for name in latentdiff.__all__:
        assert getattr(latentdiff, name) is not None
    assert set(latentdiff.__all__) <= set(dir(latentdiff))


HEAVY = "import sys; print(sorted({'torch', 'numpy', 'pydantic', 'diffusers', 'cyclopts', 'rich'} & set(sys.modules)))"


def after(code: str) -> str:
    """What of the heavy libraries Python has loaded after this code."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{HEAVY}"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("module", ["latentdiff", "latentdiff.cli"])
def test_importing_loads_nothing_heavy(module):
    assert after(f"import {module}") == "[]"


@pytest.mark.parametrize("tokens", [["--help"], ["--version"], ["generat"], []], ids=" ".join)
def test_the_overview_loads_nothing_heavy(tokens):
    code = f"""
from latentdiff.cli import main
try:
    main({tokens})
except SystemExit:
    pass"""
    assert after(code) == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_flag_is_told_before_torch_is_loaded(command):
    code = f"""
from latentdiff.cli import main
try:
    main(["{command}", "--nothing-such"])
except SystemExit as end:
    assert end.code == 2"""
    assert "torch" not in after(code)


def test_help_whose_reader_has_gone_is_no_mistake():
    for tokens in ("--help", "generate --help"):
        command = f"{sys.executable} -m latentdiff {tokens} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("0\n", "")


def test_renamed_keywords_work_with_a_warning():
    @renamed(num_inference_steps="steps")
    def function(model: str, steps: int = 1) -> tuple[str, int]:
        return model, steps

    with pytest.warns(DeprecationWarning, match="num_inference_steps is now called steps"):
        assert function("m", num_inference_steps=3) == ("m", 3)
    assert function("m", steps=2) == ("m", 2)
    with pytest.raises(TypeError, match="not both"):
        function("m", steps=2, num_inference_steps=3)
    assert list(inspect.signature(function).parameters) == ["model", "steps"]


def test_train_takes_a_file_or_a_loaded_config(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        latentdiff.train(tmp_path / "c.yaml", overrides=["train.steps=1"])
    config = latentdiff.load_config(Path(__file__).parents[2] / "configs" / "fashion-mnist" / "diffusion.yaml")
    with pytest.raises(UserError, match="overrides: belong to a config file"):
        latentdiff.train(config, overrides=["train.steps=1"])
