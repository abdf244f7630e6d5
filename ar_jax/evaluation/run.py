"""From a trained run to its report."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax

from ar_jax.api import Params, System
from ar_jax.build import (
    AnyTokenizer,
    build_objective,
    create_sampler,
    trains_tokenizer,
)
from ar_jax.evaluation import illustrated, sections
from ar_jax.evaluation.adm import Standard, check_number, check_rank, compare, measure_reference
from ar_jax.evaluation.files import check_free
from ar_jax.evaluation.image_set import open_images
from ar_jax.evaluation.labels import balanced_labels
from ar_jax.evaluation.load import describe_weights, image_section, load_system, load_tokenizer
from ar_jax.evaluation.lpips import load_lpips
from ar_jax.evaluation.measure import (
    SHOWN,
    Evaluation,
    reconstruct,
    scale_names,
)
from ar_jax.evaluation.order_likelihood import order_likelihood_section
from ar_jax.evaluation.plots import save_bars
from ar_jax.evaluation.real import find_judge, open_splits
from ar_jax.evaluation.reference import open_reference
from ar_jax.evaluation.report import read_report, write_report
from ar_jax.evaluation.samples import (
    check_class_conditional,
    describe_sampling,
    generate,
    sampling_of,
    save_npz,
)
from ar_jax.evaluation.standard import comparison_section, record_samples
from ar_jax.io.run_info import read_config
from ar_jax.sampling.set_likelihood import has_likelihood

log = logging.getLogger(__name__)


def evaluate_workdir(
    workdir: str | Path,
    directory: str | Path | None = None,
    *,
    num_images: int = 1000,
    likelihood_images: int | None = None,
    batch_size: int = 100,
    source: str | None = None,
    seed: int = 0,
    step: int | None = None,
    lpips: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    standard: Standard | None = None,
) -> dict[str, Any]:
    """Evaluates a trained tokenizer or generator and writes its report and pictures.

    Args:
        workdir: of the run; its EMA is evaluated, if it keeps one.
        directory: gets report.json, report.md, pictures and, for generators, samples.npz; None:
            ``workdir/evaluation``.
        num_images, likelihood_images, batch_size, seed, progress: see `Evaluation`.
        source: of the images, as `config.data.source`; None: the run's, for one that trained on
            codes the images they were made of.
        step: of the checkpoint; None for the newest.
        lpips: converted weights, for the LPIPS of reconstructions; None leaves it out.
        overwrite: a report that is there already.
        standard: also measures FID and its like; of reconstructions, against the test images.

    Returns:
        The report's sections, as plain values; see `ar_jax.evaluation.report`.

    Raises:
        ValueError: names what is wrong.
    """
    workdir = Path(workdir)
    directory = workdir / "evaluation" if directory is None else Path(directory)
    check_free(directory, overwrite)
    counts = {"num_images": num_images, "batch_size": batch_size}
    if likelihood_images is not None:
        counts["likelihood_images"] = likelihood_images
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    config: Any = read_config(workdir)
    is_tokenizer = trains_tokenizer(config)
    load: Any = load_tokenizer if is_tokenizer else load_system
    config, system, params = load(workdir, step=step)
    tokenizer = system if is_tokenizer else system.tokenizer
    distance = None if lpips is None else load_lpips(lpips, tokenizer.image_shape)
    data = open_splits(
        image_section(config, source), tokenizer, params if is_tokenizer else params["tokenizer"]
    )
    with jax.default_matmul_precision(config["precision"]):
        log.info("looking at the real images")
        judge, no_judge = find_judge(data["train"], data["test"], tokenizer.image_shape)
        evaluation = Evaluation(
            data=data,
            judge=judge,
            no_judge=no_judge,
            directory=directory,
            num_images=num_images,
            likelihood_images=likelihood_images,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            standard=standard,
            lpips=distance,
        )
        weights = describe_weights(workdir, config, step)
        if is_tokenizer:
            title = f"Tokenizer {config['tokenizer']['name']}"
            report = evaluate_tokenizer(system, params, evaluation)
        else:
            title = f"Generator {config['schedule']['name']} over {config['tokenizer']['name']}"
            report = evaluate_generator(config, system, params, evaluation, weights)
    model = {"model": illustrated.model_section(weights, params, tokenizer)}
    closing = illustrated.closing_sections(workdir, evaluation, tokenizer.image_shape[-1])
    write_report(directory, title, model | report | closing)
    return read_report(directory)


def evaluate_tokenizer(
    tokenizer: AnyTokenizer, params: Params, evaluation: Evaluation
) -> dict[str, Any]:
    """Sections on reconstructions, on the codebook, if any, and on what generators can reach.

    Raises:
        ValueError: the data are codes.
    """
    if evaluation.data["test"].source.kind != "image":
        raise ValueError(f"{evaluation.data['test'].source.name}: a tokenizer needs images")
    limit = None
    if evaluation.standard is not None:
        if evaluation.standard.reference is not None:
            raise ValueError(
                f"--reference={evaluation.standard.reference}: reconstructions are compared with "
                "the test images that they are of; --source names others"
            )
        rules, test = evaluation.standard.rules, evaluation.data["test"].source
        limit = check_number(test.name, len(test), rules.num_images)
        check_rank(evaluation.standard.extractor, test.name, limit, rules)
    seen = reconstruct(tokenizer, params, evaluation, limit)
    report = {"reconstruction": illustrated.reconstruction_section(seen, evaluation)}
    if seen.codebook is not None:
        names, codes = scale_names(tokenizer.grids), seen.codebook
        save_bars(
            {"codebook usage": codes.usage, "codebook perplexity": codes.perplexity},
            names,
            evaluation.directory / "codebook.png",
            xlabel="scale",
        )
        pictures = {"Codebook usage and perplexity of every scale.": "codebook.png"}
        whole = tokenizer.index_size == tokenizer.codebook_size
        entries = "entries" if whole else "first bits of codes"
        report["codebook"] = sections.codebook_section(
            codes, names, "test images", pictures, entries
        )
    return report | illustrated.bound_section(seen, evaluation)


def evaluate_generator(
    config: Any, system: System, params: Params, evaluation: Evaluation, weights: str
) -> dict[str, Any]:
    """Sections on generated images, likelihood and memorisation, with pictures and samples.npz.

    Args:
        config: of the run: `sampling` is read.
        system: with its ``params``.
        evaluation: what with.
        weights: which parameters these are, for the report.

    Raises:
        ValueError: a generator of anything but classes, or samples that cannot be balanced.
    """
    check_class_conditional(system)
    classes, directory = system.backbone.num_classes, evaluation.directory
    if evaluation.num_images % classes:
        fits = max(evaluation.num_images // classes, 1) * classes
        raise ValueError(
            f"--num_images={evaluation.num_images} cannot be balanced over {classes} classes: "
            f"use {fits}"
        )
    real = None
    if (standard := evaluation.standard) is not None:  # before the samples, which take long
        shape = system.tokenizer.image_shape
        check_rank(standard.extractor, "the samples", evaluation.num_images, standard.rules)
        reference = open_reference(standard.reference, shape)
        real = measure_reference(standard.extractor, shape, reference, standard.rules)
    knobs, guidance = sampling_of(config)
    sampler = create_sampler(system, params)
    drawn = generate(
        sampler,
        balanced_labels(evaluation.num_images, classes),
        seed=evaluation.seed,
        batch_size=evaluation.batch_size,
        knobs=knobs,
        guidance=guidance,
        scratch=directory,
        progress=evaluation.progress,
    )
    sampling = f"{describe_sampling(knobs, guidance)}, {weights}, seed {evaluation.seed}"
    save_npz(directory / "samples.npz", drawn.images, drawn.labels)
    record_samples(directory / "samples.npz", sampling)
    pictures = illustrated.draw_samples(sampler, drawn, classes, directory)
    report = illustrated.generation_sections(drawn, evaluation, sampling, pictures)
    if standard is not None and real is not None:
        images = open_images(directory / "samples.npz")
        number = evaluation.num_images
        rules = dataclasses.replace(standard.rules, num_images=number, num_classes=classes)
        result = compare(standard.extractor, images, real, rules)
        report["standard"] = comparison_section(result, sampling)
    objective = build_objective(config)
    if hasattr(objective, "METRICS"):  # what is trained is no likelihood of codes step by step
        report["held_out"] = illustrated.held_out_section(objective, system, params, evaluation)
    else:
        report["likelihood"] = illustrated.likelihood_section(system, params, evaluation)
    if has_likelihood(system):
        report["order_likelihood"] = order_likelihood_section(system, params, evaluation)
    if evaluation.data["test"].source.kind == "image":
        limit = SHOWN if evaluation.judge is None else None
        alone = dataclasses.replace(evaluation, standard=None)  # rFID is of a tokenizer's report
        seen = reconstruct(system.tokenizer, params["tokenizer"], alone, limit)
        report["reconstruction"] = illustrated.reconstruction_section(seen, evaluation)
        report |= illustrated.bound_section(seen, evaluation)
    return report
