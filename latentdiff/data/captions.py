"""Captions of a data set: which an image has, which one a training step draws, and their encoded states on disk.

A frozen text encoder gives the same states whenever it is asked, so each distinct caption is encoded once. Shards are
written whole or not at all and say what they were made of; ones of another encoder or other captions are refused.
They hold float16, and float32 where an encoder gives numbers beyond its range, as T5's may.
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
    refuse_difference,
    shard_count,
    shard_path,
    shard_rows,
    stored_identity,
    sweep_if_free,
    tensor_shapes,
    write_shard,
)
from latentdiff.errors import UserError
from latentdiff.models.loading import UNUSED
from latentdiff.models.text_encoder import NULL_PROMPT, OWN_LENGTH, PromptEncoder, train_tokenizer, uses_mask
from latentdiff.utils import signals

FORMAT = 2  # 1 held infinities for what float16 cannot
SHARD_SIZE = 4096
MANY = 20_000  # captions whose tokens are counted for a report


class Captions:
    """The captions of N images as rows of a table of distinct ones, of which row 0 is the empty prompt.

    Attributes: distinct (the table, strings), starts and counts (int64 [N]: where in `rows` an image's captions are).
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
        """The first caption of `count` images spread evenly over the data: always the same ones."""
        images = torch.linspace(0, len(self.counts) - 1, min(count, len(self.counts))).long()
        return self.first(images)

    def first(self, images: Tensor) -> list[str]:
        """The first caption of each of these images [B]."""
        return [self.distinct[row] for row in self.rows[self.starts[images]].tolist()]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.distinct).encode()).hexdigest()


def token_facts(texts: Sequence[str], tokenizer: Any, limit: int) -> dict[str, Any]:
    """How many tokens captions have, the marks of start and end among them, and how many captions are cut at the limit.

    {"captions", "longest", "limit", "cut", "longest_caption"}; a caption that comes twice counts twice.
    """
    counts: list[int] = []
    for start in range(0, len(texts), 4096):
        part = list(texts[start : start + 4096])
        counts += map(len, tokenizer(part, truncation=False, return_attention_mask=False, verbose=False)["input_ids"])
    longest = max(range(len(counts)), key=counts.__getitem__)
    return {
        "captions": len(counts),
        "longest": counts[longest],
        "limit": limit,
        "cut": sum(count > limit for count in counts),
        "longest_caption": texts[longest][:200],
    }


def own_token_facts(texts: Sequence[str]) -> dict[str, Any]:
    """`token_facts` for a text encoder of one's own with the config's default vocabulary and length.

    Its tokenizer is learnt on the captions; of more than MANY of them, on some that are spread evenly, and these are counted.
    """
    some = texts[:: -(-len(texts) // MANY)]
    tokenizer = train_tokenizer(some, TextConfig.model_fields["vocabulary"].default, OWN_LENGTH)
    return token_facts(some, tokenizer, OWN_LENGTH)


class CaptionStates:
    """Encoded captions, float16 or float32 [U, L, d] on disk, read through memory maps."""

    def __init__(self, folder: Path, made_of: Identity, check: str = "full"):
        """check: "full" holds every shard against its sha256, about two seconds a gigabyte on a slow core.

        "size" looks at its length alone.
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
    """Encode every distinct caption into `folder`, going on from the shards that are there, and open the result.

    Processes 0..world-1 make shards rank, rank + world, ... each; wait() returns once all have. UserError where the
    folder has states of another encoder, length or captions, where the encoder gives a caption no finite states, and where
    another job is making shards there. check: as in `CaptionStates`. A signal ends the work after a shard.
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
    if _missing(folder, made_of):
        with building(folder, rank, world):
            _make_shards(prompts, captions, folder, made_of, batch, progress, range(rank, shard_count(made_of), world))
    else:
        sweep_if_free(folder)
    wait()
    return CaptionStates(folder, made_of, check)


def _missing(folder: Path, made_of: Identity) -> bool:
    """Whether a shard is missing or truncated. UserError where one is of something else."""
    missing = False
    for number in range(shard_count(made_of)):
        stored = stored_identity(shard_path(folder, number))
        if stored is not None:
            refuse_difference(folder, stored, made_of, "caption states")
        missing |= stored is None
    return missing


def _make_shards(
    prompts: PromptEncoder,
    captions: Captions,
    folder: Path,
    made_of: Identity,
    batch: int,
    progress: Callable[[int, int], None] | None,
    mine: range,
) -> None:
    total, done = sum(len(shard_rows(made_of, number)) for number in mine), 0
    with signals.watched() as watch, watch.deferred():
        for number in mine:
            path, rows = shard_path(folder, number), shard_rows(made_of, number)
            if stored_identity(path) is None:
                pieces = []
                for start in range(rows.start, rows.stop, batch):
                    texts = captions.distinct[start : min(start + batch, rows.stop)]
                    pieces.append(_compact(prompts.states(texts).cpu(), texts))
                    if progress:
                        progress(done + start + len(texts) - rows.start, total)
                write_shard(path, {"states": torch.cat(pieces)}, made_of)  # float32 where any piece is
                if watch:
                    watch.stop()
            done += len(rows)


def _compact(states: Tensor, texts: Sequence[str]) -> Tensor:
    """States [B, L, d] of these texts in float16, or as they are where that would make infinities of them."""
    finite = states.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        text = texts[int((~finite).nonzero()[0])]
        raise UserError(f"condition.text.encoder: gives no finite states of the caption {text[:60]!r}; use another encoder")
    small = states.half()
    return small if bool(small.isfinite().all()) else states


def encoder_fingerprint(prompts: PromptEncoder) -> str:
    """sha256 over the encoder's weights, the tokenizer and whether padding is masked: what states depend on.

    Not over a pooler's: no state passes through it, and where it was not saved its weights are random.
    """
    digest = hashlib.sha256(str(uses_mask(prompts.encoder)).encode())
    digest.update(json.dumps(sorted(prompts.tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(prompts.encoder.state_dict().items()):
        if name.startswith(UNUSED):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
