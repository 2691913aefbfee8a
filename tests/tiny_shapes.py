"""Coloured shapes in two styles, with prompts, and the config of a judge for them."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 32


THINGS = ["red square", "red circle", "green square", "green circle", "blue square", "blue circle"]


STYLES = ["line", "solid"]


HELD_OUT = {("line", "red circle"), ("solid", "green square")}


SMALL = {"widths": (8, 16, 16, 32), "dim": 16}


def shape(thing: str, style: str) -> Image.Image:
    colour, form = thing.split()
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    paint = getattr(pen, {"square": "rectangle", "circle": "ellipse"}[form])
    paint((5, 5, 26, 26), fill=colour if style == "solid" else None, outline=colour, width=3)
    return picture


def write_shapes(root: Path, things: list[str] = THINGS, **changes) -> Path:
    """Six things in two styles, two of the pairs in test/. changes: of every row; None leaves a column out."""
    for part in ("train", "test"):
        lines = []
        for style in STYLES:
            for thing in things:
                if ((style, thing) in HELD_OUT) != (part == "test"):
                    continue
                file = f"{style}/{thing.replace(' ', '-')}.png"
                (root / part / style).mkdir(parents=True, exist_ok=True)
                shape(thing, style).save(root / part / file)
                text = [thing, f"a {thing}", f"{style} style, {thing}"]
                row = {"file_name": file, "text": text, "style": style, "identity": f"id {thing}", "name": thing, **changes}
                lines.append(json.dumps({key: value for key, value in row.items() if value is not None}))
        (root / part / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def judge_tree(data: Path, output: Path, **changes) -> dict:
    train = {"steps": 150, "batch_size": 12, "precision": "float32", "threads": 1}
    tree = {"stage": "judge", "output": str(output), "data": {"source": str(data)}, "train": train}
    return tree | {"model": {"widths": list(SMALL["widths"]), "dim": SMALL["dim"]}, "strength": 0.5} | changes
