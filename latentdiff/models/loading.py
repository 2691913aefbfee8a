"""Loads a part of a diffusers folder (a U-Net, an autoencoder, a text encoder), or refuses it with one line that says why.

Weights are safetensors files: plain, of a variant (diffusion_pytorch_model.fp16.safetensors), or in shards with an index.
Pickles are never opened, and no code from a folder is run.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from latentdiff.errors import UserError
from latentdiff.utils.hashes import check_hashes
from latentdiff.utils.json_files import read_json
from latentdiff.utils.weights import first_non_finite

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"  # transformers' own name
LIBRARIES = ("diffusers", "transformers")  # a folder may name classes of these
# And these, which lie in a file of that name in the folder and in latentdiff.pipelines
OWN_MODULE, OWN_CLASSES = "vq_models", ("ResidualVQModel", "FSQModel")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
UNUSED = "pooler."  # weights of a text encoder that may be missing: its last hidden states do not depend on them
# What diffusers and transformers raise for a folder that is damaged or hostile
REFUSALS = (
    SafetensorError,
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    MemoryError,
    NameError,
)
# Keys of a part's config that make transformers or diffusers import packages, or fetch code or other files
FETCHING = ("quantization_config", "fusion_config", "transformers_weights", "adapter_config")
ATTENTION = ("eager", "sdpa")  # part of torch; other values of "attn_implementation" may be fetched from the Hub, and run
FIRST_VARIANTS = ("fp16", "bf16", "fp32")  # preferred to others, such as Stable Diffusion's non_ema


def weight_names(file: Path) -> set[str]:
    """The names of the tensors in a safetensors file. UserError where it is missing or truncated.

    Only the header is read; it also says how long the file must be.
    """
    if not file.is_file():
        raise UserError(f"{file}: missing; the checkpoint is incomplete")
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error}); copy or publish it again") from error


def weight_files(folder: Path, name: str = WEIGHTS) -> tuple[str | None, list[Path]]:
    """(variant or None, files) of a part's weights; each file's header is checked.

    Args:
        folder: of the part.
        name: of a plain weight file: WEIGHTS, or TEXT_WEIGHTS for transformers.

    Raises:
        UserError: there are no weights, only pickled ones, or a file is missing or truncated.
    """
    stem = name.removesuffix(".safetensors")
    for variant in (None, *_variants(folder, stem)):
        file = folder / (f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors")
        index = folder / f"{name}.index{'' if variant is None else f'.{variant}'}.json"
        if file.is_file() or index.is_file():
            files = [file] if file.is_file() else _shards(index)
            for each in files:
                weight_names(each)
            return variant, files
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickled:
        raise UserError(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code when they are read; "
            f"save them as {name} (in diffusers: save_pretrained)"
        )
    raise UserError(f"{folder / name}: missing; the checkpoint is incomplete")


def _variants(folder: Path, stem: str) -> list[str]:
    """The variants in a folder, of single files (stem.VARIANT.safetensors) and of indices, preferred ones first."""
    files = {path.name[len(stem) + 1 : -len(".safetensors")] for path in folder.glob(f"{stem}.*.safetensors")}
    indices = {path.name.split(".index.")[1][: -len(".json")] for path in folder.glob(f"{stem}.safetensors.index.*.json")}
    found = {name for name in files if "-of-" not in name} | indices
    return sorted(found, key=lambda name: (name not in FIRST_VARIANTS, name))


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: no weight_map there; it must say which file holds each weight")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise UserError(f"{index}: weight_map names {json.dumps(name)[:80]}; it must be a file beside it, without a folder")
    return [index.parent / name for name in sorted(set(names.values()))]


def part_class(pair: Any, where: str) -> type:
    """The class of a [library, class] pair of model_index.json: a model, a scheduler or a tokenizer.

    where: the file and key, for messages.

    Raises:
        UserError: it is another class. Also for a class in a file of the folder, whose code diffusers would run, and for
            Auto classes, which follow an auto_map to such a file.
    """
    library, name = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
    if library == OWN_MODULE and name in OWN_CLASSES:
        from latentdiff.pipelines import vq_models  # the installed one, never the folder's

        return getattr(vq_models, name)
    if library not in LIBRARIES or not isinstance(name, str):
        raise UserError(f"{where}: {json.dumps(pair)} is not a [library, class] pair of {' or '.join(LIBRARIES)}")
    import diffusers
    import transformers

    found = getattr(diffusers if library == "diffusers" else transformers, name, None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise UserError(f"{where}: {library} has no class {name}")
    if name.startswith("Auto") and not name.startswith("Autoencoder"):
        raise UserError(f"{where}: {library}'s {name} can run code that lies in the folder; name the class itself")
    kinds: tuple[type, ...] = (diffusers.ModelMixin, diffusers.SchedulerMixin)
    if library == "transformers":
        kinds = (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
    if not issubclass(found, kinds):
        raise UserError(f"{where}: {library}'s {name} is no {'scheduler' if library == 'diffusers' else 'tokenizer'} or model")
    return found


def is_of_diffusers(kind: type) -> bool:
    """Whether a model's class is of diffusers, or made of one of them, and not of transformers."""
    import diffusers

    return issubclass(kind, diffusers.ModelMixin)


def refuse_code(config: Any, file: Any) -> None:
    """UserError, naming `file`, where a part's config would import packages or fetch code when the part is loaded.

    config: JSON values; configs within it are checked too, at any depth.
    """
    nodes = [config]
    while nodes:
        node = nodes.pop()
        nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        for key, value in node.items() if isinstance(node, dict) else ():
            shown = json.dumps(value)[:60]
            if key in FETCHING and value is not None:
                raise UserError(f"{file}: {key} {shown} would import or fetch more than this folder's weights; leave it out")
            if "attn_implementation" in key or "experts_implementation" in key:
                names = value.values() if isinstance(value, dict) else [value]
                if any(name is not None and name not in ATTENTION for name in names):
                    raise UserError(f"{file}: {key} {shown} may be fetched from the Hub and run; valid: {', '.join(ATTENTION)}")


def _check_size(file: Path, config: dict[str, Any], weights: list[Path], kind: Any) -> None:
    """UserError for a config with more layers or weights than the files hold, before memory is allocated for them.

    file: config.json. kind: a diffusers class; None for transformers, which allocates nothing before it reads the weights.
    """
    tensors = 0
    for each in weights:
        with safe_open(each, framework="pt") as opened:
            dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        unreal = sorted(name for name, dtype in dtypes.items() if dtype in ("BOOL", "C64"))
        if unreal:
            raise UserError(f"{each}: {unreal[0]} is {dtypes[unreal[0]]}; weights are real numbers")
        tensors += len(dtypes)
    if not tensors:
        raise UserError(f"{weights[0]}: holds no weights")
    for key, value in config.items():
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, (int, float))]
        if "layers" in key and any(n > tensors for n in numbers):
            raise UserError(f"{file}: {key} is {str(value)[:40]}, and the weights are {tensors} tensors in all")
    if kind is not None:
        try:
            with quiet(), torch.device("meta"):
                needed = sum(p.numel() for p in kind.from_config(config).parameters())
        except REFUSALS as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file}: {kind.__name__} cannot be made of it: {reason}") from error
        size = sum(each.stat().st_size for each in weights)
        if needed > size:
            shown = weights[0] if len(weights) == 1 else file.parent
            raise UserError(f"{shown}: {size} bytes are too few for the {needed} weights that {file.name} describes")


def load_part(where: str | Path, kind: Any, dtype: torch.dtype = torch.float32, verify: bool = True) -> Any:
    """A diffusers or transformers model, on the CPU, in eval mode, with every weight read and finite.

    Args:
        where: the model's folder, or a Hub name.
        kind: its class, a diffusers ModelMixin or a transformers PreTrainedModel.
        dtype: that the weights are loaded in.
        verify: check the files against the hashes beside them, if there are any; about two seconds a gigabyte.

    Raises:
        UserError: a file is missing, damaged, hostile or does not fit the others; the message names it.
    """
    folder, shown, of_diffusers = Path(where), str(where), is_of_diffusers(kind)
    # Otherwise diffusers leaves a missing weight without a device, and Auto classes of transformers may run code
    options: dict[str, Any] = {"low_cpu_mem_usage": False} if of_diffusers else {"trust_remote_code": False}
    try:
        if folder.is_dir():
            config = read_json(folder / "config.json")
            refuse_code(config, folder / "config.json")
            options["variant"], files = weight_files(folder, WEIGHTS if of_diffusers else TEXT_WEIGHTS)
            shown = str(files[0] if len(files) == 1 else folder)
            _check_size(folder / "config.json", config, files, kind if of_diffusers else None)
            if verify:
                check_hashes(files)
        with quiet():
            model, report = kind.from_pretrained(
                str(where),
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=folder.is_dir(),
                output_loading_info=True,
                **options,
            )
    except UserError:
        raise
    except REFUSALS as error:
        raise UserError(f"{shown}: cannot read the weights: {' '.join(str(error).split())[:200]}") from error
    wrong = sorted(map(str, report.get("mismatched_keys") or ()))
    if wrong:
        raise UserError(f"{shown}: cannot read the weights: {len(wrong)} of another shape, the first is {wrong[0]}")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(UNUSED))
    if missing:  # diffusers and transformers leave them at random initial values and only log it
        raise UserError(f"{shown}: cannot read the weights: {len(missing)} weights missing, the first is {missing[0]}")
    if name := first_non_finite(model.named_parameters()):
        raise UserError(f"{shown}: {name} is not finite in {str(dtype)[6:]}: damaged, diverged, or too large for that type")
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, diffusers and transformers show no progress bars and log only errors."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # `torch_dtype` has a new name, which the oldest supported versions do not know
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
