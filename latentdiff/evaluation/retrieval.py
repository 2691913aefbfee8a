"""Judge generated pictures by retrieval: is the nearest real picture one of the wanted thing?

There are two groups of pairs (style, identity): "seen", whose pictures models are trained on, and "held-out", whose pictures
they are not trained on. The scores of generated pictures stand beside a ceiling and beside chance. The ceiling is the score
of real pictures of the same pairs with small faults put into them. Chance is the score of the generated pictures against
the prompts of other pairs. The distance to the nearest training picture shows memorisation.
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
from latentdiff.evaluation.tables import markdown_table
from latentdiff.models.judge_net import JudgeNet, embed
from latentdiff.utils.random import derive_seed

MILD = 0.5  # strength of the augmentation of the ceiling's real pictures
SEEN, HELD_OUT = "seen", "held-out"
GENERATED, AUGMENTED, RECONSTRUCTED, SHUFFLED = "generated", "augmented real", "reconstructed real", "shuffled prompts"
BATCH = 256


@dataclass(frozen=True)
class PictureIndex:
    """All real pictures of a data set with a judge's embeddings, against which pictures are ranked.

    Attributes:
        net: the judge.
        pairs: the data set of N pictures.
        embeddings: [N, D], of unit length.
    """

    net: JudgeNet
    pairs: Pairs
    embeddings: Tensor

    def ranks(self, embeddings: Tensor, identities: Tensor) -> Tensor:
        """How many other identities are as near to each picture as the right one, or nearer; int64 [Q].

        An identity is as near as the nearest of its pictures, in any style. A tie counts against the picture, so that a judge
        that cannot tell anything apart scores nothing.

        Args:
            embeddings: of Q pictures, [Q, D].
            identities: the right ones, int64 [Q].
        """
        index = self.pairs.identities.expand(len(embeddings), -1)  # [Q, N]
        nearness = torch.full((len(embeddings), len(self.pairs.identity_names)), -torch.inf)
        nearness = nearness.scatter_reduce(1, index, embeddings @ self.embeddings.T, "amax")  # [Q, identities]
        return (nearness >= nearness.gather(1, identities[:, None])).sum(dim=1) - 1


def index_pictures(net: JudgeNet, pairs: Pairs, name: str = "") -> PictureIndex:
    """Embed all pictures of a data set.

    The names of identities and styles do not show that a judge was trained on these pictures: others, or another held-out
    part, can have the same names. So the data's fingerprint is compared too, if the judge has recorded one.

    Args:
        net: the judge.
        pairs: the data set.
        name: what the user called the judge, for errors.

    Raises:
        UserError: the judge was trained on other data.
    """
    flag = f"--judge {name}".rstrip()
    if net.identities != pairs.identity_names or net.styles != pairs.style_names:
        trained, current = (
            f"{len(identities)} identities in {', '.join(styles)}"
            for identities, styles in ((net.identities, net.styles), (pairs.identity_names, pairs.style_names))
        )
        raise UserError(f"{flag}: was trained on other pairs ({trained}) than those of --data {pairs.name} ({current})")
    recorded, fingerprint = net.info.get("data_fingerprint"), pairs.fingerprint()
    if recorded not in (None, fingerprint):
        raise UserError(
            f"{flag}: was trained on data with fingerprint {str(recorded)[:12]}, and --data {pairs.name} has "
            f"{fingerprint[:12]}: other pictures, or other pairs held out; give the data it was trained on, or train a judge "
            "on these"
        )
    parts = torch.arange(len(pairs)).split(BATCH)
    return PictureIndex(net, pairs, torch.cat([embed(net, pairs.images(rows))[0] for rows in parts]))


def chosen_rows(index: PictureIndex, num_seen: int) -> dict[str, Tensor]:
    """The pairs to draw, as rows of the data set: num_seen of the seen ones (or all), evenly spread; all held-out ones."""
    seen, held_out = ((index.pairs.held_out == part).nonzero().flatten() for part in (False, True))
    spread = torch.linspace(0, len(seen) - 1, min(num_seen, len(seen))).round().long()
    return {SEEN: seen[spread], HELD_OUT: held_out}


def judge_pictures(
    index: PictureIndex,
    drawn: Mapping[str, tuple[Tensor, Tensor]],
    seed: int = 0,
    reconstruct: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Score generated pictures, and measure how near they are to pictures that models are trained on.

    Args:
        index: the real pictures.
        drawn: {group: (images [Q, 3, H, W] in [-1, 1], rows [Q] of the pairs they should show)}.
        seed: of the ceiling's augmentation and of the shuffle.
        reconstruct: the model's autoencoder, images to images; real pictures through it are a second ceiling. None: without.

    Returns:
        {"scores": {group: {kind of pictures: `retrieval_scores`}},
        "nearest_training_picture": {kind of pictures: `nearest_training_distances`}}.
    """
    scores: dict[str, Any] = {}
    distances: dict[str, Any] = {}
    for group, (images, rows) in drawn.items():
        scores[group] = {
            GENERATED: retrieval_scores(index, images, rows),
            AUGMENTED: augmented_scores(index, rows, seed),
            SHUFFLED: retrieval_scores(index, images, _cycle(rows, seed)),
        }
        if reconstruct is not None:
            real = torch.cat([reconstruct(index.pairs.images(part)).clamp(-1, 1) for part in rows.split(BATCH)])
            scores[group][RECONSTRUCTED] = retrieval_scores(index, real, rows)
        distances[f"{GENERATED}, {group}"] = nearest_training_distances(index, images)
    held_out = index.pairs.images(index.pairs.held_out.nonzero().flatten())
    distances[f"real, {HELD_OUT}"] = nearest_training_distances(index, held_out)
    return {"scores": scores, "nearest_training_picture": distances}


def retrieval_scores(index: PictureIndex, images: Tensor, rows: Tensor) -> dict[str, Any]:
    """Shares of images [Q, 3, H, W] in [-1, 1] that show the pairs in `rows` [Q] of the data set.

    Returns:
        {"pictures": Q, "top1", "top5", "style", "top5_in_style"}. top1, top5: the right identity, in any style, is the nearest,
        or among the five nearest. style: the judge recognises the right style. top5_in_style: top5 and style at once.
    """
    embeddings, styles = embed(index.net, images)
    ranks = index.ranks(embeddings, index.pairs.identities[rows])
    in_style = styles == index.pairs.styles[rows]
    hits = {"top1": ranks < 1, "top5": ranks < 5, "style": in_style, "top5_in_style": (ranks < 5) & in_style}
    return {"pictures": len(ranks)} | {name: hit.double().mean().item() for name, hit in hits.items()}


def augmented_scores(index: PictureIndex, rows: Tensor, seed: int, strength: float = MILD) -> dict[str, Any]:
    """What `retrieval_scores` gives for slightly changed real pictures: the score of a perfect model with small faults.

    Args:
        index: the real pictures, and the judge network.
        rows: which of them, int64 [Q].
        seed: of the random changes, see `evaluation.augmentation.augment`.
        strength: of the changes, in [0, 1]; 0 is none.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "ceiling"))
    images = torch.cat([augment(index.pairs.images(part), generator, strength) for part in rows.split(BATCH)])
    return retrieval_scores(index, images, rows)


def nearest_training_distances(index: PictureIndex, images: Tensor) -> dict[str, Any]:
    """The median over images [Q, 3, H, W] in [-1, 1] of the distance to the nearest training picture.

    Returns:
        {"pictures": Q, "pixels": root mean square of pixels whose range is 1, "embedding": between unit vectors, 0 to 2}.
    """
    train = (~index.pairs.held_out).nonzero().flatten()
    embeddings, _ = embed(index.net, images)
    cosine = (embeddings @ index.embeddings[train].T).amax(dim=1)
    flat, real = images.flatten(1), index.pairs.images(train).flatten(1)  # [Q, d], [T, d]
    nearest = (real.square().sum(dim=1) - 2 * flat @ real.T).argmin(dim=1)  # [Q]; the part of |q - r|^2 that depends on r
    pixels = (flat - real[nearest]).square().mean(dim=1).sqrt() / 2  # from [-1, 1] to a range of 1
    return {
        "pictures": len(images),
        "pixels": pixels.median().item(),
        "embedding": (2 - 2 * cosine).clamp(min=0).sqrt().median().item(),
    }


def judge_markdown(table: Mapping[str, Any]) -> str:
    """The result of `judge` as Markdown: scores, distances, protocol."""
    keys = ("top1", "top5", "style", "top5_in_style")
    rows = [
        (kind, group, entries[kind]["pictures"], *(f"{100 * entries[kind][key]:.1f} %" for key in keys))
        for kind in (GENERATED, AUGMENTED, RECONSTRUCTED, SHUFFLED)
        for group, entries in table["scores"].items()
        if kind in entries
    ]
    header = ("pictures", "pairs", "number", "identity, top 1", "identity, top 5", "style", "top 5 in the right style")
    distances = [
        (kind, f"{entry['pixels']:.3f}", f"{entry['embedding']:.3f}")
        for kind, entry in table["nearest_training_picture"].items()
    ]
    lines = markdown_table(header, rows)
    lines += ["", *markdown_table(("median distance to the nearest training picture", "pixels", "embedding"), distances)]
    protocol = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in table["protocol"].items())
    return "\n".join([*lines, "", protocol]) + "\n"


def _cycle(rows: Tensor, seed: int) -> Tensor:
    """rows [Q] in another order, in which none stays in its place."""
    order = permutation(len(rows), seed, "shuffled prompts")
    shuffled = torch.empty_like(rows)
    shuffled[order] = rows[order.roll(1)]
    return shuffled
