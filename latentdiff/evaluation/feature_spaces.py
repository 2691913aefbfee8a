"""Feature spaces that others trained: the Inception of the literature's FID, and vision encoders by folder or Hub name."""

from __future__ import annotations

import hashlib
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

from latentdiff.errors import UserError
from latentdiff.models.feature_net import FeatureSpace, load_features
from latentdiff.models.loading import quiet, refuse_code
from latentdiff.utils.weights import CONFIG_FILE, fingerprint

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # its name ends in the first digits of its sha256
_VISION_KINDS = ("CLIPModel", "SiglipModel", "Siglip2Model")  # a text tower beside the vision tower


def open_space(what: str | Path) -> FeatureSpace:
    """The feature space that --features names, frozen and in eval mode.

    what: a folder of a network trained here; a folder or Hub name of a transformers vision encoder (DINOv2, CLIP's or
    SigLIP's vision tower, ViT ...); or INCEPTION_FILE's path.  UserError naming what would be valid.
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
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


class VisionEncoder(FeatureSpace):
    """pooler_output of a transformers vision encoder, on images scaled to its own side and normalised by its own constants.

    Both sides of a distance are scaled alike, from what is compared: bicubic, antialiased, to side x side, corners not
    aligned, rounded and clamped to 8 bits, as image processors work.  Grey images are repeated to three channels.
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
    """The vision encoder in a folder or of a Hub name; UserError where it is none, or has no pooled output."""
    import transformers

    try:
        with quiet():
            refuse_code(transformers.PretrainedConfig.get_config_dict(where)[0], f"--features {where}: config.json")
            model = transformers.AutoModel.from_pretrained(where, use_safetensors=True, trust_remote_code=False)
        constants, _ = transformers.BaseImageProcessor.get_image_processor_dict(where)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, ImportError and the Hub's own
        raise UserError(f"--features {where}: not a transformers vision encoder that can be read ({_line(error)})") from None
    encoder = model.vision_model if type(model).__name__ in _VISION_KINDS else model
    side = _side(constants.get("crop_size") if constants.get("do_center_crop", True) else None) or _side(constants.get("size"))
    mean, std = constants.get("image_mean"), constants.get("image_std")
    if encoder.main_input_name != "pixel_values" or not side or not mean or not std or len(mean) != 3:
        said = f"{type(model).__name__} is no encoder of RGB images with a preprocessor_config.json"
        raise UserError(f"--features {where}: {said}")
    name = Path(where).resolve().name if Path(where).is_dir() else str(where)
    space = VisionEncoder(encoder.eval().requires_grad_(False), name, side, list(mean), list(std)).eval()
    with torch.no_grad():
        pooled = getattr(encoder(torch.zeros(1, 3, side, side)), "pooler_output", None)
    if pooled is None or pooled.shape != (1, space.dim):
        raise UserError(f"--features {where}: {type(model).__name__} has no pooled output of its hidden size to measure in")
    return space


def _side(size: Any) -> int | None:
    """The side of what a processor makes: of a number, of {height, width} that are equal, of {shortest_edge}."""
    if isinstance(size, dict):
        sides = set(size.values()) if size.keys() <= {"height", "width"} else {size.get("shortest_edge")}
        size = sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


class Inception(FeatureSpace):
    """The 2048 pooled activations of the 2015-12-05 Inception, by torch-fidelity: what FID in the literature means.

    Its own bilinear resize to 299 as TensorFlow 1 made it is inside; images are given to it in 8 bits.
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
    """The Inception whose weights lie in a file; sha256: how the file's hash begins.

    UserError for another file, and where torch-fidelity is not installed.  Nothing but tensors is read from the file: not
    by torch-fidelity, which would take any pickle.
    """
    path = Path(path)
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            hashed.update(part)
    digest = hashed.hexdigest()
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
    """torch-fidelity's Inception without its __init__, which imports torchvision for data sets that are not needed here."""
    if "torch_fidelity" not in sys.modules:
        spec = importlib.util.find_spec("torch_fidelity")
        if spec is None:
            raise UserError("--features: Inception needs torch-fidelity; install it by pip install 'latentdiff[fid]'")
        package = ModuleType("torch_fidelity")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["torch_fidelity"] = package
        try:
            return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        finally:
            del sys.modules["torch_fidelity"]  # so that an import of the whole of it is that
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def open_features(what: str | Path) -> FeatureSpace:
    """The feature space that --features names: by path, one that ships, or a vision encoder's Hub name; see `spaces`."""
    from latentdiff.checkpoints import resolve_model

    on_hub = not Path(what).exists() and HUB_NAME.fullmatch(str(what)) and Path(what).parts[0] != "weights"
    return open_space(what if on_hub else resolve_model(what, "--features", "model.safetensors"))
