"""Generated pictures judged by retrieval: which real picture is nearest, beside a ceiling, chance and memorisation.

Two groups of pairs (style, identity): seen, whose pictures models are trained on, and held-out, whose pictures they are
not. A ceiling is what real pictures of the same pairs score with small faults put into them; chance is what the
generated ones score against each other's pairs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.data.pairs import Pairs
from latentdiff.data.shuffling import permutation
from latentdiff.errors import UserError
from latentdiff.evaluation.augmentation import augment
from latentdiff.models.judge_net import JudgeNet, embed
from latentdiff.utils.random import derive_seed

MILD = 0.5  # strength of the augmentation of the ceiling's real pictures
SEEN, HELD_OUT = "seen", "held-out"
GENERATED, AUGMENTED, RECONSTRUCTED, SHUFFLED = "generated", "augmented real", "reconstructed real", "shuffled prompts"
BATCH = 256


@dataclass(frozen=True)
class PictureIndex:
    """All real pictures as a judge sees them: what queries are ranked against."""

    net: JudgeNet
    pairs: Pairs
    embeddings: Tensor  # [N, D]

    def ranks(self, embeddings: Tensor, wanted: Tensor) -> Tensor:
        """How many other identities are as near to each query [Q, D] as the wanted one [Q], or nearer; int64 [Q].

        An identity is as near as the nearest of its pictures, whatever its style. A tie counts against the query, so
        that a judge that cannot tell anything apart scores nothing.
        """
        index = self.pairs.identities.expand(len(embeddings), -1)  # [Q, N]
        nearness = torch.full((len(embeddings), len(self.pairs.identity_names)), -torch.inf)
        nearness = nearness.scatter_reduce(1, index, embeddings @ self.embeddings.T, "amax")  # [Q, identities]
        return (nearness >= nearness.gather(1, wanted[:, None])).sum(dim=1) - 1


def index_pictures(net: JudgeNet, pairs: Pairs, name: str = "") -> PictureIndex:
    """The index of a data set. UserError where the judge, called `name`, was trained on other data.

    Identities and styles alone do not show it: other pictures of the same things, or others of them held out, have the
    same. A judge that keeps no record of its data is taken at its names.
    """
    flag = f"--judge {name}".rstrip()
    if net.identities != pairs.identity_names or net.styles != pairs.style_names:
        theirs, ours = (
            f"{len(i)} identities in {', '.join(s)}"
            for i, s in ((net.identities, net.styles), (pairs.identity_names, pairs.style_names))
        )
        raise UserError(f"{flag}: was trained on other pairs ({theirs}) than those of --data {pairs.name} ({ours})")
    trained, given = net.info.get("data_fingerprint"), pairs.fingerprint()
    if trained not in (None, given):
        raise UserError(
            f"{flag}: was trained on data with fingerprint {str(trained)[:12]}, and --data {pairs.name} has {given[:12]}: "
            "other pictures, or other pairs held out; give the data it was trained on, or train a judge on these"
        )
    return PictureIndex(
        net, pairs, torch.cat([embed(net, pairs.images(rows))[0] for rows in torch.arange(len(pairs)).split(256)])
    )


def chosen_rows(index: PictureIndex, num_seen: int) -> dict[str, Tensor]:
    """Rows of the pairs to be drawn: num_seen of the seen ones (or all), evenly spread, and every held-out one."""
    seen, held_out = ((index.pairs.held_out == part).nonzero().flatten() for part in (False, True))
    spread = torch.linspace(0, len(seen) - 1, min(num_seen, len(seen))).round().long()
    return {SEEN: seen[spread], HELD_OUT: held_out}


def judge_pictures(
    index: PictureIndex,
    drawn: Mapping[str, tuple[Tensor, Tensor]],
    seed: int = 0,
    reconstruct: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """The scores of generated pictures, and how near they are to pictures that models are trained on.

    drawn: {group: (images [Q, 3, H, W] in [-1, 1], rows [Q] of the pairs wanted)}. seed: of the ceiling's augmentation
    and of the shuffle. reconstruct: the model's first stage, images to images; real pictures through it are a second
    ceiling.
    Returns {"scores": {group: {what: `scores`}}, "nearest_training_picture": {what: `nearest`}}.
    """
    table: dict[str, Any] = {"scores": {}, "nearest_training_picture": {}}
    for group, (images, rows) in drawn.items():
        shuffled = _cycle(rows, seed)
        table["scores"][group] = {
            GENERATED: retrieval_scores(index, images, rows),
            AUGMENTED: augmented_scores(index, rows, seed),
            SHUFFLED: retrieval_scores(index, images, shuffled),
        }
        if reconstruct is not None:
            real = torch.cat([reconstruct(index.pairs.images(part)).clamp(-1, 1) for part in rows.split(BATCH)])
            table["scores"][group][RECONSTRUCTED] = retrieval_scores(index, real, rows)
        table["nearest_training_picture"][f"{GENERATED}, {group}"] = nearest_training_distances(index, images)
    real = index.pairs.images(index.pairs.held_out.nonzero().flatten())
    table["nearest_training_picture"][f"real, {HELD_OUT}"] = nearest_training_distances(index, real)
    return table


def retrieval_scores(index: PictureIndex, images: Tensor, rows: Tensor) -> dict[str, Any]:
    """Shares of images [Q, 3, H, W] in [-1, 1] that show the pairs in `rows` [Q] of the data set.

    top1, top5: the wanted identity, in any style, is the nearest, or among the five nearest. style: the style head says
    the wanted one. top5_in_style: both at once.
    """
    embeddings, told = embed(index.net, images)
    ranks = index.ranks(embeddings, index.pairs.identities[rows])
    styled = told == index.pairs.styles[rows]
    hits = {"top1": ranks < 1, "top5": ranks < 5, "style": styled, "top5_in_style": (ranks < 5) & styled}
    return {"pictures": len(ranks)} | {name: hit.double().mean().item() for name, hit in hits.items()}


def augmented_scores(index: PictureIndex, rows: Tensor, seed: int, strength: float = MILD) -> dict[str, Any]:
    """`scores` of the real pictures of these rows, augmented: what a perfect model with small faults would get."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "ceiling"))
    images = torch.cat([augment(index.pairs.images(part), generator, strength) for part in rows.split(BATCH)])
    return retrieval_scores(index, images, rows)


def nearest_training_distances(index: PictureIndex, images: Tensor) -> dict[str, Any]:
    """Medians over images [Q, 3, H, W] in [-1, 1] of the distance to the nearest picture of train/.

    pixels: root mean square over pixels whose range is 1. embedding: between the judge's unit vectors, 0 to 2.
    """
    train = (~index.pairs.held_out).nonzero().flatten()
    embeddings, _ = embed(index.net, images)
    cosine = (embeddings @ index.embeddings[train].T).amax(dim=1)
    flat, real = images.flatten(1), index.pairs.images(train).flatten(1)  # [Q, d], [T, d]
    found = (real.square().sum(dim=1) - 2 * flat @ real.T).argmin(dim=1)  # [Q]; all of |q - r|^2 that depends on r
    pixels = (flat - real[found]).square().mean(dim=1).sqrt() / 2  # from [-1, 1] to a range of 1
    return {
        "pictures": len(images),
        "pixels": pixels.median().item(),
        "embedding": (2 - 2 * cosine).clamp(min=0).sqrt().median().item(),
    }


def judge_markdown(table: Mapping[str, Any]) -> str:
    """The scores and distances of `judge_pictures` as tables, with table["protocol"] below."""
    lines = ["| pictures | pairs | number | identity, top 1 | identity, top 5 | style | top 5 in the right style |"]
    lines.append("|---|---|---|---|---|---|---|")
    groups = table["scores"]
    for what in (GENERATED, AUGMENTED, RECONSTRUCTED, SHUFFLED):
        for group, entries in groups.items():
            if what in entries:
                score = entries[what]
                shares = " | ".join(f"{100 * score[key]:.1f} %" for key in ("top1", "top5", "style", "top5_in_style"))
                lines.append(f"| {what} | {group} | {score['pictures']} | {shares} |")
    lines += ["", "| median distance to the nearest training picture | pixels | embedding |", "|---|---|---|"]
    for what, entry in table["nearest_training_picture"].items():
        lines.append(f"| {what} | {entry['pixels']:.3f} | {entry['embedding']:.3f} |")
    stated = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in table["protocol"].items())
    return "\n".join([*lines, "", stated]) + "\n"


def _cycle(rows: Tensor, seed: int) -> Tensor:
    """rows [Q] in another order in which none stays where it was."""
    order = permutation(len(rows), seed, "shuffled prompts")
    shuffled = torch.empty_like(rows)
    shuffled[order] = rows[order.roll(1)]
    return shuffled
