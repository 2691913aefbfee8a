"""Captions of a data set: which an image has, which one a training step draws, and their encoded states on disk.

A frozen text encoder always gives the same states for a caption, so each distinct caption is encoded once. Shards are
written whole or not at all, and say what they were made of; those of another encoder or other captions are refused.
They hold float16, and float32 where an encoder's numbers are beyond its range, as T5's may be.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentdiff.config import TextConfig
from latentdiff.data.tensor_shards import (
    Identity,
    building,
    check_content,
    make_shards,
    refuse_difference,
    shard_count,
    shard_path,
    shard_rows,
    stored_identity,
    sweep_if_free,
    tensor_shapes,
)
from latentdiff.errors import UserError
from latentdiff.models.loading import UNUSED
from latentdiff.models.text_encoder import NULL_PROMPT, OWN_LENGTH, PromptEncoder, token_counts, train_tokenizer, uses_mask

FORMAT = 2  # 1 had infinities where float16 cannot hold a number
SHARD_SIZE = 4096
MANY = 20_000  # captions whose tokens are counted for a report


class Captions:
    """The captions of N images, as rows of a table of distinct captions; row 0 is the empty prompt.

    captions: one caption or more of each image. Attributes: distinct (the table: strings), rows (int64: the rows of all
    images' captions, one image after another), starts and counts (int64 [N]: where in `rows` an image's captions are).
    """

    def __init__(self, captions: Sequence[Sequence[str]]):
        self.distinct = [NULL_PROMPT, *sorted({text for texts in captions for text in texts} - {NULL_PROMPT})]
        place = {text: row for row, text in enumerate(self.distinct)}
        self.rows = torch.tensor([place[text] for texts in captions for text in texts], dtype=torch.int64)
        self.counts = torch.tensor([len(texts) for texts in captions], dtype=torch.int64)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, indices: Tensor, choice: Tensor, dropped: Tensor) -> Tensor:
        """Rows of the table [B]: for each image the caption that `choice` [B] in [0, 1) picks, row 0 where dropped."""
        counts = self.counts[indices]
        picked = self.rows[self.starts[indices] + (choice.double() * counts).long().clamp(max=counts - 1)]
        return torch.where(dropped, 0, picked)

    def spread(self, count: int) -> list[str]:
        """The first captions of `count` images that are spread evenly over the data."""
        images = torch.linspace(0, len(self.counts) - 1, min(count, len(self.counts))).long()
        return self.first(images)

    def first(self, images: Tensor) -> list[str]:
        """The first caption of each of these images [B]."""
        return [self.distinct[row] for row in self.rows[self.starts[images]].tolist()]

    def fingerprint(self) -> str:
        """Hex sha256 of the table of distinct captions."""
        return hashlib.sha256(json.dumps(self.distinct).encode()).hexdigest()


def token_facts(texts: Sequence[str], tokenizer: Any, limit: int) -> dict[str, Any]:
    """How many tokens captions have, start and end tokens included, and how many captions are cut at the limit.

    Returns {"captions", "longest", "limit", "cut", "longest_caption"}. A caption that comes twice counts twice.
    """
    counts = token_counts(tokenizer, texts).tolist()
    longest = max(range(len(counts)), key=counts.__getitem__)
    return {
        "captions": len(counts),
        "longest": counts[longest],
        "limit": limit,
        "cut": sum(count > limit for count in counts),
        "longest_caption": texts[longest][:200],
    }


def own_token_facts(texts: Sequence[str]) -> dict[str, Any]:
    """`token_facts` for a text encoder that is trained from scratch, with the config's default vocabulary and length.

    Its tokenizer is learnt on the captions. Of more than MANY captions, an evenly spread part is used, and is what is counted.
    """
    some = texts[:: -(-len(texts) // MANY)]
    tokenizer = train_tokenizer(some, TextConfig.model_fields["vocabulary"].default, OWN_LENGTH)
    return token_facts(some, tokenizer, OWN_LENGTH)


class CaptionStates:
    """Encoded captions, float16 or float32 [U, L, d] on disk, read through memory maps."""

    def __init__(self, folder: Path, made_of: Identity, check: str = "full"):
        """check: "full" compares every shard with its sha256, which takes about two seconds a gigabyte on a slow core;
        "size" looks at its length alone. UserError for a shard that is missing, damaged or of another identity.
        """
        self._size = int(made_of["shard_size"])
        self._shards = []
        for number in range(shard_count(made_of)):
            path = shard_path(folder, number)
            whole = stored_identity(path) == made_of
            kind, shape = tensor_shapes(path).get("states", ("", ())) if whole else ("", ())
            if kind not in ("F16", "F32") or len(shape) != 3 or shape[0] != len(shard_rows(made_of, number)):
                raise UserError(f"{path}: truncated, or not a shard of caption states; delete it and start again")
            if check == "full":
                check_content(path, "start again, which makes only this one anew")
            self._shards.append(safe_open(path, "pt"))

    def __getitem__(self, rows: Tensor) -> Tensor:
        """States of the captions in these rows [B] of the table: float32 [B, L, d]."""
        order = rows.tolist()
        return torch.stack([self._shards[row // self._size].get_tensor("states")[row % self._size] for row in order]).float()


def build_states(
    prompts: PromptEncoder,
    captions: Captions,
    folder: str | Path,
    batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
    check: str = "full",
) -> CaptionStates:
    """Encode every distinct caption into `folder`, which may have finished shards already, and open the result.

    batch: captions encoded at a time. progress(done, total): counts this process's captions. Process `rank` of `world`
    makes shards rank, rank + world, …; wait() returns once all processes have. check: as in `CaptionStates`. A signal ends
    the work after a shard.

    UserError: the folder has states of another encoder, length or captions; another job is making shards there; or the
    encoder's states of a caption are not finite.
    """
    folder = Path(folder)
    made_of: Identity = {
        "format": FORMAT,
        "text encoder": encoder_fingerprint(prompts),
        "length": prompts.length,
        "captions": captions.fingerprint(),
        "count": len(captions.distinct),
        "shard_size": SHARD_SIZE,
    }
    missing = set()
    for number in range(shard_count(made_of)):
        stored = stored_identity(shard_path(folder, number))
        if stored is None:
            missing.add(number)
        else:
            refuse_difference(folder, stored, made_of, "caption states")
    if missing:
        with building(folder, rank, world):
            make_shards(
                folder,
                made_of,
                range(rank, shard_count(made_of), world),
                "caption states",
                missing.__contains__,
                lambda rows: _encode(prompts, captions.distinct[rows.start : rows.stop]),
                batch,
                progress,
                {},
            )
    else:
        sweep_if_free(folder)
    wait()
    return CaptionStates(folder, made_of, check)


def _encode(prompts: PromptEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """States [B, L, d] of these texts in float16, or as they are where that would make infinities of them."""
    states = prompts.states(texts).cpu()
    finite = states.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        text = texts[int((~finite).nonzero()[0])]
        raise UserError(f"condition.text.encoder: gives no finite states of the caption {text[:60]!r}; use another encoder")
    small = states.half()
    return {"states": small if bool(small.isfinite().all()) else states}


def encoder_fingerprint(prompts: PromptEncoder) -> str:
    """Hex sha256 of what states depend on: the encoder's weights, the tokenizer, and whether padding is masked.

    The weights of a pooler do not count: no state passes through it, and where it was not saved they are random.
    """
    digest = hashlib.sha256(str(uses_mask(prompts.encoder)).encode())
    digest.update(json.dumps(sorted(prompts.tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(prompts.encoder.state_dict().items()):
        if name.startswith(UNUSED):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
