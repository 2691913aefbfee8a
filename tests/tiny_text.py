"""Text runs small enough for a test: captioned stripes, and a BERT-like encoder of a few words with random weights."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tiny_runs import change, diffusion_tree, write_stripes

from latentdiff.models.text_encoder import PromptEncoder, build_text_encoder, train_tokenizer

UNET = {
    "type": "UNet2DConditionModel",
    "config": {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
}
TEXTS = ["a red apple", "a green apple", "grinning face", "blue heart"]
ENCODER = {"width": 16, "layers": 1, "heads": 2, "max_length": 12}


def write_captioned(root: Path, count: int = 48) -> Path:
    """Stripes with a label and three captions each, the last of them saying nothing of the class."""
    write_stripes(root, count)
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    rows = [(file, file.split("/")[0]) for file in files]
    lines = [{"file_name": f, "label": c, "text": [f"{c} stripes", f"a picture of {c}", "stripes"]} for f, c in rows]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def text_tree(data: Path, output: Path, autoencoder: Path, **changes: Any) -> dict[str, Any]:
    """A stage-2 config on the captions of `data`, with a small transformer of its own unless changed."""
    text = {"type": "text", "text": dict(ENCODER)}
    return change(diffusion_tree(data, output, autoencoder, model=copy.deepcopy(UNET), condition=text), changes)


def write_bert(folder: Path, words: str) -> Path:
    """A transformers folder: BertModel with random weights and a tokenizer of these words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words.split()))]
    tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate(vocabulary)}, model_max_length=10)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_prompts(length: int = 12) -> PromptEncoder:
    """A prompt encoder whose tokenizer was trained on `TEXTS`, with random weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 400, length)
    return PromptEncoder(tokenizer, build_text_encoder(tokenizer, 16, 1, 2).eval())
