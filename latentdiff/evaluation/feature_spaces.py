"""Feature networks by others: the Inception of the literature's FID, and vision encoders from a folder or the Hub."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.checkpoints import resolve_model
from latentdiff.errors import UserError
from latentdiff.models.feature_net import FeatureSpace, load_features
from latentdiff.models.loading import quiet, refuse_code
from latentdiff.utils.hashes import sha256_of
from latentdiff.utils.weights import CONFIG_FILE, fingerprint

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # its name ends in the first digits of its sha256
_WITH_TEXT_TOWER = ("CLIPModel", "SiglipModel", "Siglip2Model")


def open_features(what: str | Path) -> FeatureSpace:
    """The feature network that --features names: one of those that ship, or whatever `open_space` opens."""
    on_hub = not Path(what).exists() and HUB_NAME.fullmatch(str(what)) and Path(what).parts[0] != "weights"
    return open_space(what if on_hub else resolve_model(what, "--features", "model.safetensors"))


def open_space(what: str | Path) -> FeatureSpace:
    """A feature network, frozen and in eval mode.

    Args:
        what: a folder of a network trained by latentdiff; a folder or Hub name of a transformers vision encoder (DINOv2, the
            vision tower of CLIP or SigLIP, ViT ...); or the path of INCEPTION_FILE.

    Raises:
        UserError: it is none of these; the message says what would be valid.
    """
    path = Path(what)
    if path.is_file():
        return open_inception(path)
    if path.is_dir():
        return open_encoder(path) if _is_encoder(path) else load_features(path)
    if HUB_NAME.fullmatch(str(what)):
        return open_encoder(str(what))
    raise UserError(
        f"--features {what}: no such folder; give one of a feature network or of a transformers vision encoder, a Hub name "
        f"such as facebook/dinov2-base, or the file {INCEPTION_FILE}"
    )


def _is_encoder(folder: Path) -> bool:
    """Whether a folder's config is one of transformers."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


class VisionEncoder(FeatureSpace):
    """The pooled output of a transformers vision encoder.

    Images are scaled to the encoder's own side and normalised by its own constants. Scaling is bicubic and antialiased, to
    side x side, then rounded and clamped to 8 bits, as image processors do. Grey images are repeated to three channels.

    Args:
        encoder: the vision model.
        name: names the metrics measured in it.
        side: height and width that the encoder takes, in pixels.
        mean: of each channel, for images in [0, 1].
        std: the same.
    """

    channels = 3

    def __init__(self, encoder: nn.Module, name: str, side: int, mean: list[float], std: list[float]):
        super().__init__()
        self.encoder, self.name, self.side = encoder, name, side
        self.dim = int(encoder.config.hidden_size)
        self.info = {"resized_to": side, "resample": "bicubic, antialiased", "mean": mean, "std": std}
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1))

    def features(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.float(), (self.side, self.side), mode="bicubic", antialias=True)
        x = ((x + 1) * 127.5).round().clamp(0, 255) / 255
        return self.encoder((x - self.mean) / self.std).pooler_output.float()

    def fingerprint(self) -> str:
        return fingerprint(self, (type(self.encoder).__name__, self.side, "bicubic"))


def open_encoder(where: str | Path) -> VisionEncoder:
    """The vision encoder in a folder or of a Hub name. UserError if it is none, or has no pooled output."""
    import transformers

    try:
        with quiet():
            refuse_code(transformers.PretrainedConfig.get_config_dict(where)[0], f"--features {where}: config.json")
            model = transformers.AutoModel.from_pretrained(where, use_safetensors=True, trust_remote_code=False)
        processor, _ = transformers.BaseImageProcessor.get_image_processor_dict(where)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, ImportError and the Hub's own
        raise UserError(f"--features {where}: not a transformers vision encoder that can be read ({_line(error)})") from None
    encoder = model.vision_model if type(model).__name__ in _WITH_TEXT_TOWER else model
    cropped = processor.get("crop_size") if processor.get("do_center_crop", True) else None
    side = _side(cropped) or _side(processor.get("size"))
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if encoder.main_input_name != "pixel_values" or not side or not mean or not std or len(mean) != 3:
        reason = f"{type(model).__name__} is no encoder of RGB images with a preprocessor_config.json"
        raise UserError(f"--features {where}: {reason}")
    name = Path(where).resolve().name if Path(where).is_dir() else str(where)
    space = VisionEncoder(encoder.eval().requires_grad_(False), name, side, list(mean), list(std)).eval()
    with torch.no_grad():
        pooled = getattr(encoder(torch.zeros(1, 3, side, side)), "pooler_output", None)
    if pooled is None or pooled.shape != (1, space.dim):
        raise UserError(f"--features {where}: {type(model).__name__} has no pooled output of its hidden size to measure in")
    return space


def _side(size: Any) -> int | None:
    """The side of the images that a processor makes, from a number, from {height, width} if equal, or from {shortest_edge}."""
    if isinstance(size, dict):
        sides = set(size.values()) if size.keys() <= {"height", "width"} else {size.get("shortest_edge")}
        size = sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


class Inception(FeatureSpace):
    """The 2048 pooled activations of the Inception of 2015-12-05, by torch-fidelity: the features of the literature's FID.

    It resizes images to 299 itself, bilinearly as TensorFlow 1 did. It is given images in 8 bits.
    """

    channels, dim, name = 3, 2048, "inception-2015-12-05"

    def __init__(self, extractor: nn.Module):
        super().__init__()
        self.extractor = extractor
        self.info = {"resized_to": 299, "resample": "bilinear as in TensorFlow 1"}

    def features(self, x: Tensor) -> Tensor:
        levels = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.extractor(levels)[0].float()

    def fingerprint(self) -> str:
        return fingerprint(self, ("inception",))


def open_inception(path: str | Path, sha256: str = "6726825d") -> Inception:
    """The Inception whose weights are in a file.

    Only tensors are read from the file. torch-fidelity itself would load any pickle, so it does not read the file.

    Args:
        path: of INCEPTION_FILE.
        sha256: how the file's hash must begin.

    Raises:
        UserError: it is another file, or torch-fidelity is not installed.
    """
    path = Path(path)
    digest = sha256_of(path)
    if not digest.startswith(sha256):
        raise UserError(f"--features {path}: its sha256 begins {digest[:8]}, that of {INCEPTION_FILE} {sha256}; give that file")
    module: Any = _fidelity()
    download = module.load_state_dict_from_url
    try:
        weights = torch.load(path, weights_only=True)
        module.load_state_dict_from_url = lambda *_, **__: weights
        extractor = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except Exception as error:
        raise UserError(f"--features {path}: cannot be read as Inception's weights ({_line(error)})") from None
    finally:
        module.load_state_dict_from_url = download
    return Inception(extractor.eval().requires_grad_(False)).eval()


def _fidelity() -> ModuleType:
    """torch-fidelity's Inception without the package's __init__, which imports torchvision for its data sets."""
    name = "torch_fidelity.feature_extractor_inceptionv3"
    if "torch_fidelity" in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        raise UserError("--features: Inception needs torch-fidelity; install it by pip install 'latentdiff[fid]'")
    package = ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["torch_fidelity"]  # so that a later import gets the whole package


def _line(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split())[:200]
