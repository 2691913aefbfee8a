"""Records of evaluations: metrics.json, in which every value has its protocol, and records side by side if that is one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentdiff.checkpoints import library_versions
from latentdiff.errors import UserError
from latentdiff.evaluation.markdown_report import format_value
from latentdiff.utils.atomic import write_text

FILE, FORMAT = "metrics.json", 1
# What a value means: records that differ in one of these are not comparable. The rest is what is being compared.
EVALUATE_PROTOCOL = (
    "images",
    "seeds",
    "image_size",
    "class_counts",
    "class_balanced",
    "reference_sha256",
    "reference_images",
    "held_out_sha256",
    "held_out_images",
    "features",
    "features_sha256",
    "preparation",
    "draw_seed",
    "cas_seeds",
    "settings",
    "likelihood",
    "prompts",
)
# The same of a record of `judge`
JUDGE_PROTOCOL = ("seen_pairs", "held_out_pairs", "pairs_sha256", "judge_sha256", "prompts", "strength_of_augmentation")
PROTOCOLS = {"evaluate": EVALUATE_PROTOCOL, "judge": JUDGE_PROTOCOL}
# A record without these measurements stands beside one that has them
UNMEASURED: dict[str, Any] = {"cas_seeds": 0, "likelihood": {}}


def make_record(report: Mapping[str, Any], made: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The record of a report of `evaluate_samples`: protocol, made (how the samples were), values, and the rest of it.

    made: what the report's own protocol does not say of the samples. seconds: what took how long.
    """
    stated, reference = report["protocol"], report["reference"]
    known = {
        **{key: stated.get(key) for key in ("images", "seeds", "image_size", "class_counts", "class_balanced", "draw_seed")},
        "reference_sha256": reference["sha256"],
        "reference_images": reference["images"],
        "held_out_sha256": reference["held_out_sha256"],
        "held_out_images": reference["held_out_images"],
        "features": reference["features"],
        "features_sha256": reference["features_sha256"],
        "preparation": _preparation(reference["preprocessing"]),
        "cas_seeds": len(report["metrics"].get("cas", {}).get("seeds", [])),
        "settings": dict(report["settings"]),
        "likelihood": _bound(report.get("likelihood")),
        "prompts": stated.get("prompts") or {},
    }
    samples = {key: value for key, value in stated.items() if key not in EVALUATE_PROTOCOL}
    if "reconstruction" in report:
        samples["autoencoder_sha256"] = report["reconstruction"]["autoencoder_sha256"]
    return {
        "format": FORMAT,
        "kind": "evaluate",
        "protocol": {field: known[field] for field in EVALUATE_PROTOCOL},
        "made": {**samples, **made, "data": reference["data"], "versions": library_versions()},
        "values": _values(report),
        "per_class": report.get("per_class"),
        "guidance_curve": report.get("guidance_curve"),
        "likelihood": report.get("likelihood"),
        "memorisation": report["memorisation"],
        "reconstruction": report.get("reconstruction"),
        "left_out": report["left_out"],
        "class_names": reference["class_names"],
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
    }


def make_judge_record(
    table: Mapping[str, Any], pairs_sha256: str, judge_sha256: str, made: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """The record of a table of `judge`: shares with the augmented real pictures' as their floor, and nearest distances."""
    stated, values = table["protocol"], dict[str, Any]()
    for group, entries in table["scores"].items():
        ours, real, chance = (entries[what] for what in ("generated", "augmented real", "shuffled prompts"))
        for key in (key for key in ours if key != "pictures"):
            counts = {"images": ours["pictures"], "floor_images": real["pictures"]}
            values[f"{key}[{group}]"] = {"value": ours[key], "floor": real[key], "chance": chance[key]} | counts
    real = table["nearest_training_picture"]["real, held-out"]
    for what, entry in table["nearest_training_picture"].items():
        for space in ("pixels", "embedding") if entry is not real else ():
            values[f"nearest_training_picture_{space}[{what}]"] = {
                "value": entry[space],
                "images": entry["pictures"],
                "floor": real[space],
                "floor_images": real["pictures"],
            }
    known = {
        **{f"{group.replace('-', '_')}_pairs": entries["generated"]["pictures"] for group, entries in table["scores"].items()},
        "pairs_sha256": pairs_sha256,
        "judge_sha256": judge_sha256,
        **{key: stated[key] for key in ("prompts", "strength_of_augmentation")},
    }
    samples = {key: value for key, value in stated.items() if key not in (*JUDGE_PROTOCOL, "judge")}
    return {
        "format": FORMAT,
        "kind": "judge",
        "protocol": {field: known[field] for field in JUDGE_PROTOCOL},
        "made": {**samples, **made, "versions": library_versions()},
        "values": values,
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
    }


def _preparation(rule: Mapping[str, Any]) -> dict[str, Any]:
    """How the reference's images came to their size: what is compared is without padding, so that is no part of it."""
    scaled = rule["resample"] is not None
    prepared = {"size": rule["content"][2:], "channels": rule["channels"], "fit": rule["fit"] if scaled else "as they are"}
    filled = {"background": rule["background"]} if "background" in rule else {}  # of a letterbox
    return prepared | {"resample": rule["resample"]} | filled


def _bound(entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """What bits per dimension mean: of which images, by which observation model and solver."""
    if entry is None:
        return {}
    keys = ("split", "density", "images", "dims", "seed", "levels", "observation", "solver", "rtol", "divergence", "probes")
    return {key: entry["protocol"][key] for key in keys}


def _values(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: {value, floor, ...}}; the floor of a share of recognised images is that of real ones."""
    values = {}
    for name, entry in {**report["metrics"], **report["distribution"]}.items():
        other = {"real": "floor", "real_images": "floor_images"} if "real" in entry else {}
        values[name] = {other.get(key, key): value for key, value in entry.items()}
    for space in ("features", "pixels"):
        near = report["memorisation"][space]
        for each in near["closer_than_held_out"]:
            values[f"closer_to_training_than_{each['percentile']}%_of_held_out[{space}]"] = {
                "value": each["share"],
                "floor": each["held_out"],
                "images": near["images"],
                "floor_images": near["held_out_images"],
            }
    if "likelihood" in report:
        entry = report["likelihood"]
        values["bits_per_dim"] = {"value": entry["bits_per_dim"], "images": entry["protocol"]["images"]} | (
            {} if entry["stderr"] is None else {"stderr": entry["stderr"]}
        )
    for name in ("psnr", "ssim"):
        if "reconstruction" in report:
            entry = report["reconstruction"]
            values[f"reconstruction_{name}"] = {"value": entry[name], "images": entry["images"]}
    return values


def write_record(record: Mapping[str, Any], folder: str | Path) -> Path:
    """<folder>/metrics.json, the old or the new one, never half of it."""
    path = Path(folder) / FILE
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def is_record(what: str | Path) -> bool:
    """Whether an argument is a record: a .json file, or a folder that holds metrics.json."""
    path = Path(what)
    return path.suffix == ".json" or (path / FILE).is_file()


def read_record(what: str | Path) -> dict[str, Any]:
    """The record in a file or folder; UserError naming the file and what is wrong with it."""
    path = Path(what) if Path(what).suffix == ".json" else Path(what) / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the {FILE} that evaluate --out wrote, or its folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path}: not a record of format {FORMAT}; write it anew by latentdiff evaluate --out")
    for part in ("protocol", "made", "values"):
        if not isinstance(record.get(part), dict):
            raise UserError(f"{path}: {part} is missing; write the record anew by latentdiff evaluate --out")
    if record.get("kind") not in list(PROTOCOLS):
        raise UserError(f"{path}: kind is {_short(record.get('kind'))}; valid are {', '.join(PROTOCOLS)}")
    if record["kind"] == "evaluate":
        record["protocol"].setdefault("prompts", {})  # evaluate was of models that read none, before it was of others
    missing = [field for field in PROTOCOLS[record["kind"]] if field not in record["protocol"]]
    if missing:
        raise UserError(f"{path}: protocol.{missing[0]} is missing; a value without its protocol says nothing")
    for name, entry in record["values"].items():
        if not isinstance(entry, dict) or not _numbers(entry):
            raise UserError(f"{path}: values.{name} is not an entry with a finite value")
    return record


def _numbers(entry: Mapping[str, Any]) -> bool:
    shown_keys = [f"{side}{key}" for side in ("", "floor_") for key in ("stderr", "spread", "seed_spread")]
    there = [entry[key] for key in (*shown_keys, "floor") if entry.get(key) is not None]
    return all(isinstance(n, (int, float)) and math.isfinite(n) for n in (entry.get("value"), *there))


def compare_records(paths: Sequence[str | Path]) -> str:
    """Records side by side as Markdown: how the samples were made, then every value, and its floor.

    UserError for fewer than two, for what is no record, and, naming the field, where protocols differ.
    """
    other = [str(path) for path in paths if not is_record(path)]
    if other:
        raise UserError(f"compare: {other[0]} holds no {FILE}; give records alone, or one MODEL with --data and --samplers")
    if len(paths) < 2:
        raise UserError(f"compare: {paths[0]} is one record; give two or more to stand side by side")
    records = [read_record(path) for path in paths]
    for path, record in zip(paths[1:], records[1:], strict=True):
        check_comparable(str(paths[0]), records[0], str(path), record)
    return _side_by_side([str(path) for path in paths], records)


def check_comparable(name: str, record: Mapping[str, Any], other_name: str, other: Mapping[str, Any]) -> None:
    """UserError naming the first field of the protocol in which two records differ."""
    if record["kind"] != other["kind"]:
        raise UserError(f"compare: {name} is of latentdiff {record['kind']}, {other_name} of latentdiff {other['kind']}")
    for field in PROTOCOLS[record["kind"]]:
        ours, theirs = record["protocol"][field], other["protocol"][field]
        if ours == theirs or (field in UNMEASURED and UNMEASURED[field] in (ours, theirs)):
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            key = next(key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key))
            field, ours, theirs = f"{field}.{key}", ours.get(key), theirs.get(key)
        raise UserError(
            f"compare: {field} is {_short(ours)} in {name} and {_short(theirs)} in {other_name}: "
            "values of unlike protocols do not stand side by side"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _side_by_side(names: list[str], records: list[dict[str, Any]]) -> str:
    cells = [name.replace("|", "\\|") for name in names]
    lines = [f"| | {' | '.join(cells)} | real images |", "|---" * (len(names) + 2) + "|"]
    made = list(dict.fromkeys(key for record in records for key in record["made"]))
    for key in made:
        said = [record["made"].get(key) for record in records]
        texts = ["not stated" if value is None else _said(value) for value in said]
        lines.append(f"| {key.replace('_', ' ')} | {' | '.join(texts)} | – |")
    seconds = [record.get("seconds") for record in records]
    lines.append(f"| seconds | {' | '.join(_said(each) if each else '–' for each in seconds)} | – |")
    for name in dict.fromkeys(name for record in records for name in record["values"]):
        entries = [record["values"].get(name) for record in records]
        floors = dict.fromkeys(
            format_value(entry, "floor") for entry in entries if entry is not None
        )  # a judge's are of its seed
        values = ["–" if entry is None else format_value(entry) for entry in entries]
        lines.append(f"| {name} | {' | '.join(values)} | {', '.join(floors)} |")
    fields = {field: records[0]["protocol"][field] for field in PROTOCOLS[records[0]["kind"]]}
    stated = "; ".join(f"{field.replace('_', ' ')} {_short(value)}" for field, value in fields.items())
    return "\n".join([*lines, "", f"One protocol: {stated}."]) + "\n"


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return text if len(text) < 64 else f"{text[:12]}…"


def sampling_protocol(pipeline, model: str, seed: int = 0, batch_size: int = 128, **call) -> dict[str, Any]:
    """The protocol line of generated samples, the checkpoint's defaults filled in."""
    from latentdiff.samplers import default_steps

    config, sampler = pipeline.config, call.get("sampler")
    steps, guidance, interval = (call.get(key) for key in ("num_inference_steps", "guidance_scale", "guidance_interval"))
    if steps is None:
        own = sampler in (None, config.default_sampler)
        steps = config.default_num_inference_steps if own else default_steps(sampler, config.default_num_inference_steps)
    return {
        "model": model,
        "sampler": sampler or default_sampler(pipeline),
        "steps": steps,
        "guidance": guidance if guidance is not None else config.default_guidance_scale,
        "guidance_interval": interval if interval is not None else config.default_guidance_interval,
        "seed": seed,
    }


def default_sampler(pipeline) -> str:
    """What samples where a call names nothing: the diffusers scheduler's class, or a sampler of latentdiff."""
    return pipeline.config.default_sampler if pipeline.scheduler is None else type(pipeline.scheduler).__name__
