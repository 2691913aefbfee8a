"""Names of version 0.1, for one release: modules and what they held still import, with a DeprecationWarning.

The warning says the new name.
"""

import importlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Old module -> new module, both below latentdiff
MODULES = {
    "agreement": "evaluation.compare_denoisers",
    "atomic": "utils.atomic",
    "autoencoders.build": "models.autoencoder",
    "autoencoders.codec": "models.codec",
    "autoencoders.discriminator": "models.discriminator",
    "autoencoders.losses": "training.autoencoder_loss",
    "autoencoders.perceptual": "models.perceptual",
    "autoencoders.report": "training.autoencoder_report",
    "autoencoders.vq": "models.codebook",
    "cards": "evaluation.model_card",
    "comparison": "evaluation.compare_samplers",
    "conditioning": "models.text_encoder",
    "data.accounts": "data.file_report",
    "data.cache": "data.latent_cache",
    "data.emoji": "recipes.emoji.prepare",
    "data.emoji_captions": "recipes.emoji.captions",
    "data.files": "data.image_files",
    "data.images": "data.image_source",
    "data.listing": "data.folders",
    "data.order": "data.shuffling",
    "data.patterns": "data.range_files",
    "data.preprocess": "data.transforms",
    "data.rowgroups": "data.parquet_stream",
    "data.shards": "data.tensor_shards",
    "data.tarindex": "data.webdataset",
    "data.webshards": "data.webdataset",
    "evaluating": "evaluation.evaluate",
    "evaluation.bits": "evaluation.bits_per_dim",
    "evaluation.curve": "evaluation.guidance_curve",
    "evaluation.features": "models.feature_net",
    "evaluation.judge": "models.judge_net",
    "evaluation.kernels": "evaluation.kid",
    "evaluation.memorisation": "evaluation.memorization",
    "evaluation.neighbours": "evaluation.precision_recall",
    "evaluation.reference": "evaluation.feature_cache",
    "evaluation.report": "evaluation.metrics",
    "evaluation.scores": "evaluation.classification",
    "evaluation.sets": "evaluation.sample_sets",
    "evaluation.spaces": "evaluation.feature_spaces",
    "evaluation.statistics": "evaluation.frechet",
    "evaluation.extrapolation": "evaluation.frechet",
    "evaluation.prompts": "evaluation.sample_sets",
    "evaluation.surroundings": "evaluation.feature_metrics",
    "facts": "cli.info",
    "folders": "models.loading",
    "fonts": "utils.fonts",
    "gallery": "evaluation.gallery",
    "grids": "samplers.grids",
    "guidance.classifier_net": "guidance.latent_classifier",
    "hashes": "utils.hashes",
    "imports": "single_file",
    "judging": "evaluation.judge",
    "limits": "utils.limits",
    "locks": "utils.locks",
    "mistakes": "utils.config_errors",
    "networks": "utils.weights",
    "ode": "samplers.adaptive",
    "page": "evaluation.html_report",
    "pictures": "utils.images",
    "plain": "utils.safe_yaml",
    "planning": "training.estimate",
    "planning.dry_run": "training.dry_run",
    "planning.facts": "training.estimate",
    "planning.inputs": "training.estimate",
    "planning.progress": "training.estimate",
    "planning.stages": "training.estimate",
    "processes": "utils.processes",
    "records": "evaluation.records",
    "rng": "utils.random",
    "signals": "utils.signals",
    "tensors": "utils.tensors",
    "training.autoencoder": "training.train_autoencoder",
    "training.classifier": "training.train_classifier",
    "training.compilation": "training.compile",
    "training.conditions": "training.conditioning",
    "training.data": "training.images",
    "training.diffusion": "training.train_diffusion",
    "training.features": "training.train_feature_net",
    "training.journal": "training.logging",
    "training.judge": "training.train_judge",
    "training.loop": "training.trainer",
    "training.meters": "training.logging",
    "training.notices": "training.messages",
    "training.publishing": "training.diffusion_checkpoint",
    "training.reconstruction": "training.train_autoencoder",
    "training.republish": "training.publish",
    "training.run": "training.run_folder",
    "training.sharding": "training.distributed",
    "training.unets": "models.unet",
    "training.watching": "training.monitor",
    "tuning": "evaluation.tuning",
    "writing": "utils.outputs",
}

# Old name -> new name, of what did not move with its module or has another name there. Modules that are still there may
# stand here too. The module `commands` was split: all of it stands here.
NAMES = {
    "agreement.estimate": "evaluation.compare_denoisers.estimate_x0",
    "agreement.markdown": "evaluation.compare_denoisers.agreement_markdown",
    "atomic.EXCHANGE": "utils.atomic.RENAME_EXCHANGE",
    "atomic.HERE": "utils.atomic.AT_FDCWD",
    "atomic.WRITING": "utils.atomic.WRITE_ERRORS",
    "autoencoders.report.psnr": "evaluation.image_quality.psnr",
    "autoencoders.report.ssim": "evaluation.image_quality.ssim",
    "cards.fill_card": "evaluation.model_card.card",
    "cards.with_results": "evaluation.model_card.with_model_index",
    "checkpoints.publish": "checkpoints.save",
    "commands.DEFAULT_FEATURES": "evaluation.DEFAULT_FEATURES",
    "commands.UNPACKING_ERRORS": "evaluation.sample_sets.UNPACKING_ERRORS",
    "commands.check_classes": "evaluation.reference_data.check_classes",
    "commands.check_likelihood": "evaluation.measure_likelihood.check_likelihood",
    "commands.data_rule": "evaluation.reference_data.data_rule",
    "commands.default_sampler": "evaluation.records.default_sampler",
    "commands.dump": "cli.output.dump",
    "commands.encode": "training.encode.encode_dataset",
    "commands.likelihood": "evaluation.measure_likelihood.measure_likelihood",
    "commands.open_features": "evaluation.feature_spaces.open_features",
    "commands.read_npz": "evaluation.sample_sets.read_npz",
    "commands.reconstruct": "evaluation.reconstruct.reconstruct",
    "commands.stated": "evaluation.records.sampling_protocol",
    "commands.trained_on_means": "evaluation.reference_data.trained_on_means",
    "comparison.Bench": "evaluation.compare_samplers.SamplerBenchmark",
    "comparison.RowCounter": "evaluation.compare_samplers.EvaluationCounter",
    "comparison.compare": "evaluation.compare_samplers.compare_samplers",
    "comparison.markdown": "evaluation.compare_samplers.comparison_markdown",
    "conditioning.PromptedUNet": "models.text_encoder.UNetWithTextEncoder",
    "conditioning.Prompts": "models.text_encoder.PromptEncoder",
    "conditioning.load_prompts": "models.text_encoder.load_prompt_encoder",
    "data.accounts.Account": "data.file_report.FileReport",
    "data.accounts.Names": "data.file_report.FileNames",
    "data.cache.LatentStatistics": "data.latent_cache.LatentMoments",
    "data.patterns.MOST": "data.range_files.MOST_NAMES",
    "data.preprocess.ImageDataset": "data.datasets.ImageDataset",
    "data.preprocess.to_uint8": "utils.images.to_uint8",
    "data.rowgroups.KEPT": "data.parquet_stream.GROUPS_KEPT",
    "data.rowgroups.Parquet": "data.parquet_stream.ParquetFile",
    "data.rowgroups.Rows": "data.parquet_stream.ParquetTable",
    "data.sources.FolderSource": "data.folders.FolderSource",
    "data.tables.Loaded": "data.tables.LoadedTable",
    "data.tarindex.SIDES": "data.webdataset.TEXTS",
    "data.tarindex.Sample": "data.range_files.ImageRecord",
    "data.webshards.STAMPS": "data.range_files.VERSION_KEYS",
    "data.webshards.Shard": "data.range_files.RangeFile",
    "data.webshards.TRIES": "data.range_files.TRIES",
    "data.webshards.WebShardSource": "data.webdataset.WebDatasetSource",
    "data.webshards.find_shards": "data.range_files.find_files",
    "evaluation.extrapolation.extrapolate": "evaluation.frechet.extrapolate_frechet",
    "evaluation.extrapolation.fewest": "evaluation.frechet.smallest_sample",
    "evaluation.judge.Gallery": "evaluation.retrieval.PictureIndex",
    "evaluation.judge.look": "models.judge_net.embed",
    "evaluation.judge.open_gallery": "evaluation.retrieval.index_pictures",
    "evaluation.memorisation.Nearness": "evaluation.memorization.NearestImages",
    "evaluation.memorisation.feature_nearness": "evaluation.memorization.nearest_by_features",
    "evaluation.memorisation.penalised": "evaluation.memorization.penalized_distance",
    "evaluation.memorisation.pixel_nearness": "evaluation.memorization.nearest_by_pixels",
    "evaluation.memorisation.shares": "evaluation.memorization.distance_summary",
    "evaluation.memorisation.worst": "evaluation.memorization.closest_samples",
    "evaluation.neighbours.Support": "evaluation.precision_recall.PrecisionRecall",
    "evaluation.neighbours.nearest": "evaluation.precision_recall.nearest_rows",
    "evaluation.neighbours.radii": "evaluation.precision_recall.neighbour_radii",
    "evaluation.neighbours.support": "evaluation.precision_recall.precision_recall",
    "evaluation.reference.cache_beside": "evaluation.feature_cache.default_cache_folder",
    "evaluation.reference.see_reference": "evaluation.feature_cache.reference_statistics",
    "evaluation.report.REPORT_NAME": "evaluation.markdown_report.REPORT_NAME",
    "evaluation.report.Yardstick": "evaluation.feature_metrics.ReferenceStatistics",
    "evaluation.report.markdown": "evaluation.markdown_report.report_markdown",
    "evaluation.report.reference_sets": "evaluation.reference_data.reference_sets",
    "evaluation.report.shown": "evaluation.markdown_report.format_value",
    "evaluation.report.write_report": "evaluation.markdown_report.write_report",
    "evaluation.retrieval.markdown": "evaluation.retrieval.judge_markdown",
    "evaluation.retrieval.nearest": "evaluation.retrieval.nearest_training_distances",
    "evaluation.retrieval.scores": "evaluation.retrieval.retrieval_scores",
    "evaluation.scores.Batch": "evaluation.feature_statistics.Batch",
    "evaluation.scores.Seen": "evaluation.feature_statistics.FeatureStatistics",
    "evaluation.scores.content_hash": "evaluation.feature_statistics.content_hash",
    "evaluation.scores.digests": "evaluation.feature_statistics.pixel_digests",
    "evaluation.scores.frechet": "evaluation.frechet.frechet",
    "evaluation.scores.look": "evaluation.feature_statistics.feature_statistics",
    "evaluation.scores.read_batches": "evaluation.feature_statistics.read_batches",
    "evaluation.statistics.distance_from": "evaluation.frechet.frechet_distance_to",
    "evaluation.surroundings.Surroundings": "evaluation.feature_metrics.FeatureMetrics",
    "evaluation.surroundings.over_seeds": "evaluation.feature_metrics.mean_over_seeds",
    "facts.FEW": "data.summary.FEW",
    "facts.FOLDER_SIZE": "data.summary.FOLDER_SIZE",
    "facts.MANY_PIXELS": "data.summary.MANY_PIXELS",
    "gallery.Stage": "evaluation.gallery.GallerySampler",
    "generation.COMMON": "generation.RESERVED_OPTIONS",
    "generation.class_beside": "generation.class_of_prompts",
    "imports.PARTS": "single_file.PREFIXES",
    "pipelines.latent_diffusion.fed_times": "pipelines.latent_diffusion.network_times",
    "pipelines.latent_diffusion.suspicion": "pipelines.latent_diffusion.non_finite_cause",
    "planning.dry_run.short": "training.dry_run.three_figures",
    "planning.facts.PATIENCE": "training.estimate.ENCODING_LIMIT",
    "planning.progress.PATIENCE": "training.estimate.HOLD_BACK",
    "records.JUDGED": "evaluation.records.JUDGE_PROTOCOL",
    "records.NETWORKS": "checkpoints.NETWORKS",
    "records.PROTOCOL": "evaluation.records.EVALUATE_PROTOCOL",
    "records.check_alike": "evaluation.records.check_comparable",
    "records.weights_of": "checkpoints.weights_of",
    "samplers.common.Knot": "samplers.common.GridPoint",
    "samplers.common.knots": "samplers.common.grid_points",
    "samplers.common.look": "samplers.common.denoise_at",
    "samplers.common.report": "samplers.common.apply_callback",
    "signals.AGAIN": "utils.signals.COPY_OF_CTRL_C",
    "signals.GRACE": "utils.signals.COPY",
    "signals.typed": "utils.signals.command_line",
    "training.autoencoder.picture": "training.autoencoder_checkpoint.save_reconstructions",
    "training.autoencoder.publish": "training.autoencoder_checkpoint.save_autoencoder",
    "training.conditions.JOINT_DROPOUT": "config.JOINT_DROPOUT",
    "training.conditions.as_begun": "training.conditioning.with_recorded_dropout",
    "training.conditions.guidance": "training.conditioning.guidance_scale",
    "training.diffusion.BUCKETS": "training.train_diffusion.QUARTERS",
    "training.features.LABEL_SMOOTHING": "evaluation.feature_training.LABEL_SMOOTHING",
    "training.features.MAX_SHIFT": "evaluation.feature_training.MAX_SHIFT",
    "training.features.WARM_UP": "evaluation.feature_training.WARM_UP",
    "training.features.WEIGHT_DECAY": "evaluation.feature_training.WEIGHT_DECAY",
    "training.features.shift_images": "evaluation.feature_training.shift_images",
    "training.features.train_classifier": "evaluation.feature_training.train_classifier",
    "training.features.train_features": "evaluation.feature_training.train_features",
    "training.journal.SaveClock": "training.trainer.SaveClock",
    "training.loop.MADE_OF": "training.trainer.MADE_FROM",
    "training.loop.SLOWEST": "training.trainer.SMALLEST_LR_FACTOR",
    "training.loop.check_made_of": "training.trainer.check_made_from",
    "training.loop.shares": "training.trainer.micro_batches",
    "training.notices.end_of_stage1": "training.messages.autoencoder_finished",
    "training.notices.end_of_stage2": "training.messages.model_finished",
    "training.notices.first_stage_warnings": "training.messages.autoencoder_warnings",
    "training.notices.keep_verdict": "training.messages.save_report_lines",
    "training.notices.places_at_start": "training.messages.where_results_appear",
    "training.notices.say": "training.messages.print_lines",
    "training.notices.verdict_of": "training.messages.report_lines",
    "training.notices.warned": "training.messages.as_warnings",
    "training.publishing.PROMPTS": "training.monitor.ROWS",
    "training.reconstruction.Stage1": "training.train_autoencoder.Reconstruction",
    "training.republish.chosen": "training.publish.state_to_publish",
    "training.run.PRECISIONS": "training.accelerator.PRECISIONS",
    "training.run.announcement": "training.accelerator.announcement",
    "training.run.check_kind": "training.accelerator.check_distribution",
    "training.run.goes_on": "training.run_folder.how_to_continue",
    "training.run.gradient_norm": "training.optimizer.clip_gradient",
    "training.run.held": "training.run_folder.locked_run_folder",
    "training.run.learning_rate": "training.optimizer.learning_rate",
    "training.run.make_optimizer": "training.optimizer.make_optimizer",
    "training.run.meet": "training.accelerator.wait_for_everyone",
    "training.run.set_learning_rate": "training.optimizer.set_learning_rate",
    "training.run.settings_kept": "training.accelerator.torch_settings_restored",
    "training.run.start_accelerator": "training.accelerator.start_accelerator",
    "training.unets.Start": "models.unet.PretrainedUNet",
    "training.unets.find_start": "models.unet.find_pretrained",
    "training.watching.Watch": "training.monitor.Monitor",
    "tuning.KEYS": "evaluation.tuning.SETTING_KEYS",
    "tuning.Space": "evaluation.tuning.SearchSpace",
    "tuning.draw_front": "evaluation.tuning.plot_front",
    "tuning.front": "evaluation.tuning.pareto_front",
    "tuning.markdown": "evaluation.tuning.tuning_markdown",
    "tuning.present": "evaluation.tuning.current_default",
    "tuning.store": "evaluation.tuning.write_default",
    "writing.replace_text": "utils.atomic.write_text",
}

# What nothing replaces: parts of a larger function that are private now, take other arguments, or are done by a library.
REMOVED = {
    "cli.DEFAULT_MODEL",
    "cli.OPENING",
    "cli.Parser",
    "cli.encode_command",
    "cli.generate_command",
    "cli.import_command",
    "cli.info_command",
    "cli.prepare_command",
    "cli.publish_command",
    "cli.reconstruct_command",
    "cli.train_command",
    "data.listing.Captions",
    "data.listing.EMPTY",
    "data.listing.account_beside",
    "data.shards.shard_problem",
    "data.shards.tensor_name",
    "data.tables.note_images_beside",
    "data.tarindex.BLOCK",
    "data.webshards.cached_index",
    "measures.add_cost",
    "measures.add_device",
    "measures.add_measures",
    "measures.agreement_command",
    "measures.card_command",
    "measures.compare_command",
    "measures.evaluate_command",
    "measures.gallery_command",
    "measures.judge_command",
    "measures.likelihood_command",
    "measures.tune_command",
    "networks.load_network",
    "networks.save_network",
    "pipelines.latent_diffusion.require",
    "planning.facts.data_facts",
    "planning.facts.encoding",
    "planning.facts.note_compile",
    "planning.facts.parameters",
    "planning.facts.warn_of_time",
    "planning.facts.without_impossible_guidance",
    "planning.inputs.find_images",
    "planning.inputs.first_stage",
    "planning.inputs.image_shape",
    "planning.inputs.is_here",
    "planning.inputs.latent_shape",
    "planning.stages.class_count",
    "planning.stages.plan_autoencoder",
    "planning.stages.plan_diffusion",
    "signals.ending",
    "signals.name_of",
    "signals.say_end",
    "training.autoencoder.publish_state",
    "training.autoencoder.to_train",
    "training.conditions.joint_dropout",
    "training.conditions.pipeline_pieces",
    "training.conditions.takes",
    "training.diffusion.Parts",
    "training.diffusion.made_of",
    "training.diffusion.publish_state",
    "training.journal.Journal",
    "training.latents.latent_shape",
    "training.loop.Work",
    "training.loop.resume",
    "training.loop.run_loop",
    "training.loop.save",
    "training.loop.snapshot",
    "training.publishing.picture",
    "training.publishing.pipeline_parts",
    "training.publishing.publish",
    "training.reconstruction.Parts",
    "training.reconstruction.draw_noise",
    "training.reconstruction.update",
    "training.republish.STAGES",
    "training.unets.check_latents",
    "writing.write_grid",
}


class OldNames(MetaPathFinder, Loader):
    """Finds modules of version 0.1: those that have moved, and those that are still there but have lost names."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "latentdiff" or old not in KNOWN:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:  # a folder without modules is one that an earlier version has left behind
            return ModuleSpec(fullname, self, is_package=any(name.startswith(f"{old}.") for name in MODULES))
        run_module = spec.loader.exec_module

        def run_and_add_names(module: ModuleType) -> None:
            run_module(module)
            vars(module).setdefault("__getattr__", lambda name: find_moved(old, name))

        spec.loader.exec_module = run_and_add_names  # type: ignore[method-assign]
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.partition(".")[2]
        advice = f"use latentdiff.{MODULES[old]}" if old in MODULES else "its functions are elsewhere"
        warnings.warn(f"latentdiff.{old} has moved; {advice}", DeprecationWarning, stacklevel=2)
        module.__getattr__ = lambda name: find_moved(old, name, warn=False)  # type: ignore[method-assign]


def find_moved(old: str, name: str, warn: bool = True) -> Any:
    """What the module `old` of version 0.1 had under this name. AttributeError where there was no such name, or is none now."""
    place = NAMES.get(f"{old}.{name}") or (f"{MODULES[old]}.{name}" if old in MODULES else None)
    if f"{old}.{name}" in REMOVED or name.startswith("__") or place is None:
        reason = "; it was removed, and nothing replaces it" if f"{old}.{name}" in REMOVED else ""
        raise AttributeError(f"module 'latentdiff.{old}' has no attribute {name!r}{reason}")
    module, _, attribute = place.rpartition(".")
    value = getattr(importlib.import_module(f"latentdiff.{module}"), attribute)
    if warn:
        warnings.warn(f"latentdiff.{old}.{name} has moved; use latentdiff.{place}", DeprecationWarning, stacklevel=3)
    return value


def _with_parents(names: Iterable[str]) -> set[str]:
    return {".".join(parts[: k + 1]) for parts in (name.split(".") for name in names) for k in range(len(parts))}


# Modules of version 0.1 that the finder looks after, and the packages that held some that have moved
KNOWN = _with_parents(MODULES) | {name.rpartition(".")[0] for name in (*NAMES, *REMOVED)}


def install() -> None:
    """Let old names import. The finder stands first, because a module that is still there is to find its old names too."""
    sys.meta_path.insert(0, OldNames())
