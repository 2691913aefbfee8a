"""Records of evaluations: metrics.json, in which every value has its protocol. Records of one protocol can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentdiff.checkpoints import is_over_codes, library_versions
from latentdiff.errors import UserError
from latentdiff.evaluation.tables import NONE, format_setting, format_value, markdown_table
from latentdiff.utils.atomic import write_text

FILE, FORMAT = "metrics.json", 1
# What a value depends on: records that differ in one of these fields cannot be compared. All else is what is being compared
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
    "classifier",
    "preparation",
    "draw_seed",
    "cas_seeds",
    "settings",
    "likelihood",
    "prompts",
)
JUDGE_PROTOCOL = ("seen_pairs", "held_out_pairs", "pairs_sha256", "judge_sha256", "prompts", "strength_of_augmentation")
PROTOCOLS = {"evaluate": EVALUATE_PROTOCOL, "judge": JUDGE_PROTOCOL}
# Fields of measurements that may be left out, with their value in a record that has none: it compares with one that has
LEFT_OUT: dict[str, Any] = {"cas_seeds": 0, "likelihood": {}, "classifier": None}
# What the protocol's "likelihood" holds of the likelihood's own protocol
LIKELIHOOD_FIELDS = (
    "split",
    "density",
    "images",
    "dims",
    "seed",
    "levels",
    "observation",
    "solver",
    "rtol",
    "divergence",
    "probes",
)


def make_record(report: Mapping[str, Any], made: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The record of a report of `metrics.evaluate_samples`, as JSON values.

    Args:
        report: the report.
        made: facts on how the samples were made that the report's protocol does not have.
        seconds: {step: how long it took}.

    Returns:
        {"format", "kind": "evaluate", "protocol", "made", "values": {name: {value, floor, images ...}}, ...}.
    """
    sampling, reference = report["protocol"], report["reference"]
    likelihood, rule = report.get("likelihood"), reference["preprocessing"]

    # How the images got their size. They are compared without padding, so padding is no part of it
    scaled = rule["resample"] is not None
    preparation = {"size": rule["content"][2:], "channels": rule["channels"], "fit": rule["fit"] if scaled else "as they are"}
    preparation["resample"] = rule["resample"]
    if "background" in rule:  # of a letterbox
        preparation["background"] = rule["background"]

    known = {
        **{field: sampling.get(field) for field in EVALUATE_PROTOCOL},
        "reference_sha256": reference["sha256"],
        "reference_images": reference["images"],
        "held_out_sha256": reference["held_out_sha256"],
        "held_out_images": reference["held_out_images"],
        "features": reference["features"],
        "features_sha256": reference["features_sha256"],
        "classifier": reference["classifier"],
        "preparation": preparation,
        "cas_seeds": len(report["metrics"].get("cas", {}).get("seeds", [])),
        "settings": dict(report["settings"]),
        "likelihood": {} if likelihood is None else {key: likelihood["protocol"][key] for key in LIKELIHOOD_FIELDS},
        "prompts": sampling.get("prompts") or {},
    }
    samples = {key: value for key, value in sampling.items() if key not in EVALUATE_PROTOCOL}
    if "reconstruction" in report:
        samples["autoencoder_sha256"] = report["reconstruction"]["autoencoder_sha256"]
    return {
        "format": FORMAT,
        "kind": "evaluate",
        "protocol": known,
        "made": {**samples, **made, "data": reference["data"], "versions": library_versions()},
        "values": _values(report),
        "per_class": report.get("per_class"),
        "guidance_curve": report.get("guidance_curve"),
        "likelihood": likelihood,
        "memorisation": report["memorisation"],
        "reconstruction": report.get("reconstruction"),
        "left_out": report["left_out"],
        "class_names": reference["class_names"],
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
    }


def _values(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: {value, floor, ...}} of all that a report measured."""
    values = {}
    renamed = {"real": "floor", "real_images": "floor_images"}  # label accuracy and CAS call their floor so
    for name, entry in {**report["metrics"], **report["distribution"]}.items():
        values[name] = {renamed.get(key, key): value for key, value in entry.items()} if "real" in entry else dict(entry)
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
        values["bits_per_dim"] = {"value": entry["bits_per_dim"], "images": entry["protocol"]["images"]}
        if entry["stderr"] is not None:
            values["bits_per_dim"]["stderr"] = entry["stderr"]
    if "reconstruction" in report:
        entry = report["reconstruction"]
        for name in ("psnr", "ssim"):
            values[f"reconstruction_{name}"] = {"value": entry[name], "images": entry["images"]}
    return values


def make_judge_record(
    table: Mapping[str, Any], pairs_sha256: str, judge_sha256: str, made: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """The record of a table of `judge`, as JSON values. The floor of a share is that of augmented real pictures.

    Args:
        table: the result of `judge`.
        pairs_sha256: hash of the data set of pairs.
        judge_sha256: hash of the judge network.
        made: facts on how the pictures were made that the table's protocol does not have.
        seconds: {step: how long it took}.
    """
    sampling, values = table["protocol"], dict[str, Any]()
    for group, entries in table["scores"].items():
        generated, real, chance = (entries[kind] for kind in ("generated", "augmented real", "shuffled prompts"))
        for key in (key for key in generated if key != "pictures"):
            counts = {"images": generated["pictures"], "floor_images": real["pictures"]}
            values[f"{key}[{group}]"] = {"value": generated[key], "floor": real[key], "chance": chance[key]} | counts
    distances = dict(table["nearest_training_picture"])
    real = distances.pop("real, held-out")
    for kind, entry in distances.items():
        for space in ("pixels", "embedding"):
            values[f"nearest_training_picture_{space}[{kind}]"] = {
                "value": entry[space],
                "images": entry["pictures"],
                "floor": real[space],
                "floor_images": real["pictures"],
            }
    known = {
        **{f"{group.replace('-', '_')}_pairs": entries["generated"]["pictures"] for group, entries in table["scores"].items()},
        "pairs_sha256": pairs_sha256,
        "judge_sha256": judge_sha256,
        "prompts": sampling["prompts"],
        "strength_of_augmentation": sampling["strength_of_augmentation"],
    }
    samples = {key: value for key, value in sampling.items() if key not in (*JUDGE_PROTOCOL, "judge")}
    return {
        "format": FORMAT,
        "kind": "judge",
        "protocol": {field: known[field] for field in JUDGE_PROTOCOL},
        "made": {**samples, **made, "versions": library_versions()},
        "values": values,
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
    }


def write_record(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write <folder>/metrics.json, so that the file is the old or the new one, never half of it; return its path."""
    path = Path(folder) / FILE
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def is_record(what: str | Path) -> bool:
    """Whether an argument is a record: a .json file, or a folder that holds metrics.json."""
    path = Path(what)
    return path.suffix == ".json" or (path / FILE).is_file()


def read_record(what: str | Path) -> dict[str, Any]:
    """Read the record in a .json file or in a folder. UserError naming the file and what is wrong with it."""
    path = Path(what) if Path(what).suffix == ".json" else Path(what) / FILE
    try:
        return parse_record(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the {FILE} that evaluate --out wrote, or its folder") from None


def parse_record(raw: bytes, path: str) -> dict[str, Any]:
    """The record in the bytes of a metrics.json. UserError naming what is wrong. path: what an error calls the file."""
    try:
        record = json.loads(raw.decode("utf-8"))
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
        record["protocol"].setdefault("prompts", {})  # earlier versions measured no models that read text
        record["protocol"].setdefault("classifier", None)  # they had none but the feature network's own
    missing = [field for field in PROTOCOLS[record["kind"]] if field not in record["protocol"]]
    if missing:
        raise UserError(f"{path}: protocol.{missing[0]} is missing; a value without its protocol says nothing")
    for name, entry in record["values"].items():
        if not isinstance(entry, dict) or not _has_finite_numbers(entry):
            raise UserError(f"{path}: values.{name} is not an entry with a finite value")
    return record


def _has_finite_numbers(entry: Mapping[str, Any]) -> bool:
    """Whether an entry's value is a finite number, and each of the numbers that are shown beside it, if it is there."""
    keys = ["floor", *(f"{side}{key}" for side in ("", "floor_") for key in ("stderr", "spread", "seed_spread"))]
    numbers = [entry.get("value"), *(entry[key] for key in keys if entry.get(key) is not None)]
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)


def compare_records(paths: Sequence[str | Path]) -> str:
    """Records side by side as Markdown: how the samples were made, then every value, and its floor.

    UserError for fewer than two records, for a path that is no record, and, naming the field, for unequal protocols.
    """
    other = [str(path) for path in paths if not is_record(path)]
    if other:
        raise UserError(f"compare: {other[0]} holds no {FILE}; give records alone, or one MODEL with --data and --samplers")
    if len(paths) < 2:
        raise UserError(f"compare: {paths[0]} is one record; give two or more to stand side by side")
    return comparison_table([str(path) for path in paths], [read_record(path) for path in paths])


def comparison_table(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str:
    """Two or more records side by side, as `compare_records` shows them. names: what to call them.

    UserError, naming the field, for unequal protocols.
    """
    for name, record in zip(names[1:], records[1:], strict=True):
        check_comparable(names[0], records[0], name, record)

    rows: list[list[str]] = []
    for key in dict.fromkeys(key for record in records for key in record["made"]):
        rows.append([key.replace("_", " "), *(_cell(record["made"].get(key)) for record in records), NONE])
    rows.append(["seconds", *(_cell(record["seconds"]) if record.get("seconds") else NONE for record in records), NONE])
    for name in dict.fromkeys(name for record in records for name in record["values"]):
        entries = [record["values"].get(name) for record in records]
        floors = dict.fromkeys(
            format_value(entry, "floor") for entry in entries if entry is not None
        )  # a judge's differ by seed
        rows.append([name, *(NONE if entry is None else format_value(entry) for entry in entries), ", ".join(floors)])
    fields = {field: records[0]["protocol"][field] for field in PROTOCOLS[records[0]["kind"]]}
    protocol = "; ".join(f"{field.replace('_', ' ')} {_short(value)}" for field, value in fields.items())
    lines = markdown_table(("", *names, "real images"), rows)
    return "\n".join([*lines, "", f"One protocol: {protocol}."]) + "\n"


def check_comparable(name: str, record: Mapping[str, Any], other_name: str, other: Mapping[str, Any]) -> None:
    """UserError naming the first field of the protocol in which two records differ. name, other_name: what to call them."""
    if record["kind"] != other["kind"]:
        raise UserError(f"compare: {name} is of latentdiff {record['kind']}, {other_name} of latentdiff {other['kind']}")
    for field in PROTOCOLS[record["kind"]]:
        first, second = record["protocol"][field], other["protocol"][field]
        if first == second or (field in LEFT_OUT and LEFT_OUT[field] in (first, second)):
            continue
        if isinstance(first, dict) and isinstance(second, dict):
            key = next(key for key in (*first, *second) if first.get(key) != second.get(key))
            field, first, second = f"{field}.{key}", first.get(key), second.get(key)
        raise UserError(
            f"compare: {field} is {_short(first)} in {name} and {_short(second)} in {other_name}: "
            "values of unlike protocols do not stand side by side"
        )


def _short(value: Any) -> str:
    """A value of the protocol as JSON, cut to 40 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _cell(value: Any) -> str:
    """A fact on samples; a long one, such as a hash, is cut."""
    text = format_setting(value)
    return text if len(text) < 64 or isinstance(value, dict) else f"{text[:12]}…"


def sampling_protocol(pipeline: Any, model: str, seed: int = 0, batch_size: int = 128, **call: Any) -> dict[str, Any]:
    """How samples of a checkpoint are generated, with the checkpoint's defaults filled in.

    Args:
        pipeline: the loaded checkpoint.
        model: its name.
        seed: of the samples.
        batch_size: changes no sample and is left out.
        call: arguments of the pipeline's call: sampler, num_inference_steps, guidance_scale, guidance_interval.

    Returns:
        {"model", "sampler", "steps", "guidance", "guidance_interval", "seed"}; and guidance_rule, guidance_rescale and
        guidance_options where the checkpoint's default has them and guidance is on.
    """
    from latentdiff.guidance.rules import default_call
    from latentdiff.samplers import default_steps

    config, sampler = pipeline.config, call.get("sampler")
    steps, guidance, interval = (call.get(key) for key in ("num_inference_steps", "guidance_scale", "guidance_interval"))
    if steps is None:
        steps = config.default_num_inference_steps
        if sampler not in (None, config.default_sampler) and not is_over_codes(config):
            steps = default_steps(sampler, steps)
    scale = guidance if guidance is not None else config.default_guidance_scale
    return {
        "model": model,
        "sampler": sampler or default_sampler(pipeline),
        "steps": steps,
        "guidance": scale,
        "guidance_interval": interval if interval is not None else config.default_guidance_interval,
        **(default_call(config) if scale != 1 else {}),
        "seed": seed,
    }


def default_sampler(pipeline: Any) -> str:
    """What a checkpoint samples with by default: its scheduler's class, or the name of one of latentdiff's samplers."""
    return pipeline.config.default_sampler if pipeline.scheduler is None else type(pipeline.scheduler).__name__
