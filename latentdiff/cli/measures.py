"""The commands that measure: how they are parsed, and the one Python function that each calls."""

from __future__ import annotations

from latentdiff.errors import UserError, printable


def add_measures(commands) -> None:
    """Every command that measures a model."""
    _add_evaluate(commands)
    _add_compare(commands)
    _add_card(commands)
    _add_tune(commands)
    _add_looks(commands)
    _add_judge(commands)


def add_cost(add) -> None:
    interval = "guide only at t in this interval, 0 is data and 1 noise; 0 1 is everywhere (default: the checkpoint's)"
    add.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=interval)
    add.add_argument("--precision", default="float32", metavar="P", help="of the U-Net: float32 (default) or bfloat16")


def add_device(add) -> None:
    add.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, mps ... (default: what is there)")


def _add_sampling(add) -> None:
    add.add_argument("--steps", type=int, metavar="S")
    add.add_argument("--sampler", metavar="NAME")
    add.add_argument("--guidance", type=float, metavar="G")
    add_cost(add)
    add.add_argument("--seed", type=int, default=0, metavar="K")


def _add_features(add) -> None:
    about = "a feature network's folder, a vision encoder's folder or Hub name, or Inception's weights (see README)"
    add.add_argument("--features", default="weights/fashion-mnist-features", metavar="F", help=about)


def _add_evaluate(commands) -> None:
    add = commands.add_parser("evaluate", help="measure generated images against a data set")
    add.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint (or give --samples)")
    add.add_argument("--data", required=True, metavar="D", help="a folder, fashion-mnist, a table or shards (see README)")
    add.add_argument("--samples", metavar="FILE", help="measure an npz, or a folder of images, instead of a model")
    add.add_argument("--num-images", type=int, default=5000, metavar="N", help="class-balanced, or of captions (default 5000)")
    _add_features(add)
    add.add_argument("--cas-seeds", type=int, default=1, metavar="N", help="classifiers a side for CAS; 0 leaves it out")
    sets = "sets of images, from --seed on; values are means over them (default 1)"
    add.add_argument("--seeds", type=int, default=1, metavar="N", help=sets)
    cache = "where the data's features are kept (default: reference-cache beside --out)"
    add.add_argument("--reference-cache", metavar="DIR", help=cache)
    curve = "guidance scales at which --curve-images more are drawn and measured"
    add.add_argument("--guidance-curve", type=float, nargs="+", default=[], metavar="G", help=curve)
    add.add_argument("--curve-images", type=int, metavar="N", help="images a scale (default: --num-images, up to 1000)")
    bits = "bound the bits per dimension of N held-out images too (default 0: not; some 1 s an image)"
    add.add_argument("--bits-images", type=int, default=0, metavar="N", help=bits)
    part = "whose captions a model that reads text draws: test (default: the held-out images) or train"
    add.add_argument("--prompts", metavar="PART", help=part)
    _add_sampling(add)
    add.add_argument("--batch-size", type=int, default=128, metavar="B")
    add_device(add)
    add.add_argument("--out", metavar="DIR", help="also write evaluation.json and .md, metrics.json and index.html there")
    add.set_defaults(run=evaluate_command)


def _add_compare(commands) -> None:
    about = "records of evaluate, or one model's samplers, side by side"
    add = commands.add_parser("compare", help=about, description=compare_command.__doc__)
    add.add_argument("what", nargs="+", metavar="RECORD|MODEL", help="metrics.json files or their folders; or one checkpoint")
    add.add_argument("--data", metavar="D", help="of a MODEL: a folder, fashion-mnist, a table or shards (see README)")
    add.add_argument("--samplers", nargs="+", metavar="NAME", help="of a MODEL; or scheduler: the checkpoint's own")
    add.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50], metavar="S")
    add.add_argument("--num-images", type=int, default=1000, metavar="N", help="class-balanced images a cell (default 1000)")
    _add_features(add)
    add.add_argument("--guidance", type=float, metavar="G")
    add_cost(add)
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--batch-size", type=int, default=128, metavar="B")
    add.add_argument("--out", default="comparison", metavar="DIR", help="comparison.json and .md; an unfinished one goes on")
    add.set_defaults(run=compare_command)


def _add_card(commands) -> None:
    add = commands.add_parser("card", help="put a record's values into a model card", description=card_command.__doc__)
    add.add_argument("model", metavar="MODEL", help="the checkpoint that was measured")
    add.add_argument("--record", required=True, metavar="RECORD", help="metrics.json of evaluate --out, or its folder")
    add.add_argument("--metadata", action="store_true", help="also in the front matter's model-index, which the Hub reads")
    add.set_defaults(run=card_command)


def _add_tune(commands) -> None:
    add = commands.add_parser("tune", help="search sampler, steps and guidance; the best becomes the default")
    add.add_argument("model", metavar="MODEL")
    add.add_argument("--data", required=True, metavar="D", help="a folder, fashion-mnist, a table or shards (see README)")
    add.add_argument("--budget", type=float, default=400.0, metavar="E", help="U-Net evaluations an image in all (default 400)")
    add.add_argument("--num-images", type=int, default=1000, metavar="N", help="class-balanced images a trial (default 1000)")
    add.add_argument("--samplers", nargs="+", metavar="NAME", help="what is searched; scheduler: the checkpoint's own")
    add.add_argument("--confirm-seeds", type=int, default=3, metavar="K", help="other seeds for the finalists (default 3)")
    add.add_argument("--max-evaluations", type=float, metavar="E", help="of the choice (default: what the default takes)")
    _add_features(add)
    add.add_argument("--precision", default="float32", metavar="P", help="of the U-Net: float32 (default) or bfloat16")
    add.add_argument("--write", action="store_true", help="make the choice the checkpoint's default")
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--batch-size", type=int, default=128, metavar="B")
    add.add_argument("--out", default="tuning", metavar="DIR", help="tuning.json, .md and .png; an unfinished search goes on")
    add.set_defaults(run=tune_command)


def _add_looks(commands) -> None:
    add = commands.add_parser("agreement", help="how well models denoise, by noise level, and how far their answers differ")
    add.add_argument("models", nargs="+", metavar="MODEL", help="checkpoints over one autoencoder")
    add.add_argument("--data", required=True, metavar="D", help="whose test images are denoised")
    add.add_argument("--num-images", type=int, default=500, metavar="N")
    add.add_argument("--log-snrs", type=float, nargs="+", default=[-6, -4, -2, 0, 2, 4, 6], metavar="L", help="noise levels")
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--batch-size", type=int, default=100, metavar="B")
    add.set_defaults(run=agreement_command)

    add = commands.add_parser("gallery", help="pictures of what the denoiser does: trajectory, interpolation, guidance")
    add.add_argument("model", metavar="MODEL")
    add.add_argument("--data", required=True, metavar="D", help="whose test images are interpolated between")
    add.add_argument("--steps", type=int, default=40, metavar="S")
    add.add_argument("--sampler", default="dpmpp_2m", metavar="NAME")
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--out", default="gallery", metavar="DIR")
    add.set_defaults(run=gallery_command)

    add = commands.add_parser("likelihood", help="bits per dimension of a data set's pixels, a bound through both stages")
    add.add_argument("model", metavar="MODEL")
    add.add_argument("--data", required=True, metavar="D", help="a folder, fashion-mnist, a table or shards (see README)")
    add.add_argument("--num-images", type=int, default=200, metavar="N", help="images of the split (default 200)")
    add.add_argument("--probes", type=int, default=1, metavar="P", help="of Hutchinson's estimator for an image (default 1)")
    add.add_argument("--rtol", type=float, default=1e-2, metavar="T", help="tolerance of the ODE (default 0.01)")
    add.add_argument("--split", default="test", metavar="S", help="test (default) or train")
    add.add_argument("--unconditional", action="store_true", help="under the null class, not each image's own")
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--batch-size", type=int, default=50, metavar="B")
    add.set_defaults(run=likelihood_command)


def _add_judge(commands) -> None:
    add = commands.add_parser("judge", help="does a model draw what prompts say", description=judge_command.__doc__)
    add.add_argument("model", metavar="MODEL", help="a checkpoint that reads text")
    add.add_argument("--data", required=True, metavar="DIR", help="pictures with styles and identities (prepare emoji)")
    add.add_argument("--judge", required=True, metavar="FOLDER", help="what training a config with stage: judge made")
    add.add_argument("--num-prompts", type=int, default=200, metavar="N", help="seen pairs (default 200), and all held-out")
    _add_sampling(add)
    add.add_argument("--batch-size", type=int, default=64, metavar="B")
    add_device(add)
    add.add_argument("--out", metavar="DIR", help="also write judge.json and .md, metrics.json and grid.png there")
    add.set_defaults(run=judge_command)


def evaluate_command(arguments) -> None:
    from latentdiff.cli.output import dump
    from latentdiff.evaluation.evaluate import evaluate

    call = {"seed": arguments.seed, "batch_size": arguments.batch_size, "sampler": arguments.sampler}
    call |= {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance, "precision": arguments.precision}
    call["guidance_interval"] = arguments.guidance_interval
    report = evaluate(
        arguments.model,
        arguments.data,
        arguments.num_images,
        arguments.samples,
        arguments.features,
        arguments.out,
        arguments.cas_seeds,
        arguments.device,
        arguments.seeds,
        arguments.reference_cache,
        arguments.guidance_curve,
        arguments.curve_images,
        arguments.bits_images,
        arguments.prompts,
        **call,
    )
    if report is not None:
        print(dump(report))


def compare_command(arguments) -> None:
    """Records of evaluate side by side; or a checkpoint's samplers: what they cost and how far their images are."""
    from latentdiff.evaluation.compare_samplers import compare, comparison_markdown
    from latentdiff.evaluation.records import compare_records, is_record

    if any(is_record(what) for what in arguments.what):
        print(printable(compare_records(arguments.what), keep="\n"), end="")
        return
    if len(arguments.what) > 1:
        told = "give one MODEL, or records that evaluate --out wrote"
        raise UserError(f"compare: {arguments.what[1]} is one argument too many; {told}")
    missing = [flag for flag, value in (("--data", arguments.data), ("--samplers", arguments.samplers)) if not value]
    if missing:
        raise UserError(f"compare: {arguments.what[0]} is no record, and a MODEL needs {' and '.join(missing)}")
    options = {k: v for k, v in vars(arguments).items() if k not in ("command", "run", "what")}
    print(printable(comparison_markdown(compare(arguments.what[0], **options)), keep="\n"), end="")


def card_command(arguments) -> None:
    """Values and protocol of a record go between <!-- evaluation --> and <!-- /evaluation --> of the model's README.md."""
    from latentdiff.evaluation.model_card import fill_card

    print(fill_card(arguments.model, arguments.record, arguments.metadata))


def tune_command(arguments) -> None:
    from latentdiff.evaluation.tuning import tune, tuning_markdown

    table = tune(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")})
    print(printable(tuning_markdown(table), keep="\n"), end="")


def agreement_command(arguments) -> None:
    from latentdiff.evaluation.compare_denoisers import agreement, agreement_markdown

    table = agreement(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")})
    print(printable(agreement_markdown(table), keep="\n"), end="")


def gallery_command(arguments) -> None:
    from latentdiff.evaluation.gallery import gallery

    for path in gallery(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")}):
        print(path)


def likelihood_command(arguments) -> None:
    from latentdiff.cli.output import dump
    from latentdiff.evaluation.measure_likelihood import measure_likelihood as likelihood

    print(dump(likelihood(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")})))


def judge_command(arguments) -> None:
    """Draw each pair of style and identity from its prompt and find the nearest real pictures, as a trained judge sees."""
    from latentdiff.cli.output import dump
    from latentdiff.evaluation.judge import judge

    table = judge(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")})
    if table is not None:
        print(dump(table))
