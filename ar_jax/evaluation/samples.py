"""Images of a trained generator: drawn batch by batch, as PNG, and in ADM's npz form."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.build import AnySampler, build_sampling, create_sampler
from ar_jax.data.captions import read_captions
from ar_jax.evaluation.coding import decode_known, decode_stages
from ar_jax.evaluation.composition import Composition
from ar_jax.evaluation.grids import save_frames, upscale
from ar_jax.evaluation.labels import check_classes, choose_labels
from ar_jax.evaluation.load import describe_weights, load_system
from ar_jax.evaluation.speculation import Speculation
from ar_jax.evaluation.standard import record_samples
from ar_jax.io.images import PICTURE_CHANNELS, image_grid, save_png
from ar_jax.io.progress import Progress
from ar_jax.sampling.beam import BeamSearch
from ar_jax.sampling.draft import DraftSampler
from ar_jax.sampling.filters import BY_ENTROPY, Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from ar_jax.sampling.search import BestOf
from ar_jax.sampling.speculative import SpeculativeSampler
from ar_jax.tokenizers.tokenizer import to_uint8

MAX_STAGES = 10  # columns of a strip: VAR's scales
MAX_ROWS = 10  # rows of a strip
MAX_GRID = 400  # images of a grid: a picture of fifty thousand opens nowhere


class Generated(NamedTuple):
    """N generated images."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N], the classes that were asked for, or the captions' numbers
    codes: np.ndarray  # int32 [N, L], or float32 [N, L, C]
    order: np.ndarray | None = (
        None  # int32 [N, L], the positions as they were drawn, if not in order
    )
    calls: np.ndarray | None = None  # int32 [N], of the model, if they differ from image to image


def sampling_of(config: Any, overrides: Mapping[str, Any] | None = None) -> tuple[Knobs, Guidance]:
    """The knobs and the guidance of ``config.sampling``, with fields replaced.

    Args:
        config: of the generator's run.
        overrides: 'temperature', 'top_k', 'guidance.scale', ...: value; None leaves it.

    Raises:
        ValueError: names the unknown field or the value out of range.
    """
    section = dict(config["sampling"])
    section["guidance"] = dict(section.get("guidance", {}))
    for name, value in (overrides or {}).items():
        if value is not None:
            first, _, rest = name.partition(".")
            target, field = (section[first], rest) if rest else (section, first)
            target[field] = value
    return build_sampling({"sampling": section})


def describe_sampling(knobs: Knobs, guidance: Guidance) -> str:
    """'guidance 2 (constant), temperature 1, top-k 100', for reports: all that is not default."""
    plain = Guidance()
    fields = [guidance.kind]
    fields += [
        f"{name} {getattr(guidance, name):g}"
        for name in ("power", "start", "stop")
        if getattr(guidance, name) != getattr(plain, name)
    ]
    scale = _listed(guidance.steps) if guidance.steps else f"{guidance.scale:g}"
    parts = [f"guidance {scale} ({', '.join(fields)})"]
    parts += [f"temperature {float(knobs.temperature):g}"]
    if len(knobs.step_temperatures):
        parts += [f"times {_listed(knobs.step_temperatures)} by step"]
    entropy = {name: float(getattr(knobs, name)) for name in BY_ENTROPY}
    if entropy["entropy_gain"] or entropy["entropy_floor"] != 1:
        parts += [f"{name.replace('_', ' ')} {value:g}" for name, value in entropy.items()]
    by_step = {"top-k": knobs.step_top_k, "top-p": knobs.step_top_p}
    parts += [f"{name} {_listed(v)} by step" for name, v in by_step.items() if len(v)]
    filters = {"top-k": knobs.top_k, "top-p": knobs.top_p, "min-p": knobs.min_p}
    filters |= {"choice temperature": knobs.choice_temperature}
    parts += [f"{name} {float(v):g}" for name, v in filters.items() if v]
    if knobs.confidence != Knobs().confidence:
        parts += [f"confidence by {knobs.confidence}"]
    return ", ".join(parts + ["smooth"] * knobs.smooth)


def _listed(numbers: Any) -> str:
    return ", ".join(f"{float(number):g}" for number in numbers)


def generate(
    sampler: AnySampler | BestOf | BeamSearch | SpeculativeSampler | DraftSampler,
    labels: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 100,
    knobs: Knobs | None = None,
    guidance: Guidance | None = None,
    scratch: str | Path | None = None,
    progress: bool = False,
) -> Generated:
    """Draws one image of every class in ``labels`` [N].

    Image n depends on its label, ``seed`` and ``first + n`` alone, so other batch sizes give the
    same images up to rounding, and a long job can be done in parts. The last batch is filled up:
    one program draws all.

    ``scratch`` is a directory for the images that memory need not hold: they are then a `np.memmap`
    of a file without a name. 50,000 of 256 x 256 pixels are 9.8 GB. None: in memory.

    Raises:
        ValueError: an unknown class, a batch size below 1, or a generator not of classes.
    """
    check_class_conditional(sampler.system)
    labels = check_classes(labels, sampler.system.backbone.num_classes)
    return generate_from(
        sampler,
        {"label": labels},
        seed=seed,
        first=first,
        batch_size=batch_size,
        knobs=knobs,
        guidance=guidance,
        scratch=scratch,
        progress=progress,
    )


def generate_from(
    sampler: AnySampler | BestOf | BeamSearch | SpeculativeSampler | DraftSampler,
    cond: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 100,
    knobs: Knobs | None = None,
    guidance: Guidance | None = None,
    scratch: str | Path | None = None,
    progress: bool = False,
) -> Generated:
    """`generate` for any condition, each of whose arrays has N rows.

    Raises:
        ValueError: a batch size below 1.
    """
    count = len(next(iter(cond.values())))
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    batch_size = min(batch_size, count)
    images = _empty_images((count, *sampler.system.tokenizer.image_shape), scratch)
    codes, orders, calls = [], [], []
    with Progress(count, title="sampling", unit="image", enabled=progress) as bar:
        for start in range(0, count, batch_size):
            rows = np.arange(start, start + batch_size)
            real = min(batch_size, count - start)
            part = {name: jnp.asarray(v[np.minimum(rows, count - 1)]) for name, v in cond.items()}
            keys = image_keys(seed, first + start, batch_size)
            samples = sampler(part, keys, knobs=knobs, guidance=guidance)
            found = (_to_uint8(samples.images), samples.codes, samples.order, samples.calls)
            drawn = jax.device_get(found)
            images[start : start + real] = drawn[0][:real]
            codes.append(drawn[1][:real])
            if drawn[2] is not None:
                orders.append(drawn[2][:real])
            if drawn[3] is not None:
                calls.append(drawn[3][:real])
            bar.advance(real)
    labels = cond.get("label", np.arange(count, dtype=np.int32))
    order = np.concatenate(orders) if orders else None
    counts = np.concatenate(calls) if calls else None
    return Generated(images, labels, np.concatenate(codes), order, counts)


def _empty_images(shape: tuple[int, ...], scratch: str | Path | None) -> np.ndarray:
    """uint8 of a shape, in memory or in a file that goes with the array."""
    if scratch is None:
        return np.empty(shape, np.uint8)
    Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as file:  # the map keeps it
        return np.memmap(file, np.uint8, "w+", shape=shape)


_to_uint8 = jax.jit(to_uint8)


def check_class_conditional(system: Any) -> None:
    """Raises ValueError unless the generator's condition is a class label."""
    if system.backbone.conditioner.fields != ("label",):
        raise ValueError(
            f"config.backbone.condition={system.backbone.condition!r}: this takes generators of "
            "classes only; sample.py draws for captions with --captions"
        )


def stages(num_steps: int, limit: int = MAX_STAGES) -> tuple[int, ...]:
    """Numbers of steps after which a strip shows the image: at most ``limit``, the last is all."""
    shown = np.linspace(1, num_steps, min(num_steps, limit)).round()
    return tuple(int(n) for n in np.unique(shown))


def formation(
    sampler: AnySampler | BeamSearch,
    codes: np.ndarray,
    order: np.ndarray | None = None,
    limit: int = MAX_STAGES,
) -> np.ndarray:
    """Images as they form, uint8 [stages, N, H, W, C], of codes [N, L(, C)]; see `stages`.

    ``order``, int32 [N, L], are the positions as they were drawn; None: in order.
    """
    system = sampler.system
    shown = stages(system.schedule.num_steps, limit)
    if order is not None:
        counts = np.cumsum(system.schedule.sizes)[np.asarray(shown) - 1]
        known = np.argsort(order, axis=1)[None] < counts[:, None, None]  # [stages, N, L]
        partial = decode_known(system.tokenizer, sampler.params["tokenizer"], codes, known)
        return np.asarray(jax.device_get(partial))
    partial = decode_stages(system.tokenizer, sampler.params["tokenizer"], codes, shown)
    return np.asarray(jax.device_get(partial))


def save_npz(path: str | Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes ``arr_0`` uint8 [N, H, W, C] and ``arr_1`` int64 [N], as ADM's evaluator reads them.

    Raises:
        ValueError: images of another dtype or rank, or another number of labels.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != (len(images),):
        raise ValueError(
            f"images {images.dtype} {images.shape} with labels {labels.shape}: uint8 [N, H, W, C] "
            "and [N] are needed"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, images, labels.astype(np.int64))


def save_strip(path: str | Path, sampler: AnySampler | BeamSearch, drawn: Generated) -> None:
    """Writes the forming of the first image of each class, up to `MAX_ROWS`; see `save_frames`."""
    first = np.sort(np.unique(drawn.labels, return_index=True)[1])[:MAX_ROWS]
    order = None if drawn.order is None else drawn.order[first]
    save_frames(path, formation(sampler, drawn.codes[first], order))


def check_outputs(
    out: str | Path,
    npz: str | Path | None,
    *more: str | Path | None,
    overwrite: bool,
) -> None:
    """Raises ValueError for names that do not end as they must, and for files that exist."""
    named: list[tuple[str, str | Path | None, tuple[str, ...]]] = [("out", out, (".png",))]
    named += [("npz", npz, (".npz",)), *(("frames", path, (".gif", ".png")) for path in more)]
    for flag, path, endings in named:
        if path is None:
            continue
        if Path(path).suffix.lower() not in endings:
            raise ValueError(f"--{flag}={path} must end in {' or '.join(endings)}")
        if Path(path).exists() and not overwrite:
            raise ValueError(f"{path} exists; name another file, or say --overwrite")


def sample_workdir(
    workdir: str | Path,
    out: str | Path,
    *,
    labels: Sequence[int] | None = None,
    per_class: int | None = None,
    num_images: int | None = None,
    captions: str | Path | None = None,
    sampling: Mapping[str, Any] | None = None,
    composition: Composition | None = None,
    speculation: Speculation | None = None,
    seed: int = 0,
    batch_size: int = 100,
    step: int | None = None,
    npz: str | Path | None = None,
    strip: bool = False,
    frames: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Generated:
    """Draws images of a trained generator into files.

    Args:
        workdir: of the generator's run; its EMA is used, if it keeps one.
        out: the PNG: a grid of at most `MAX_GRID` images, a row a class with ``per_class``.
        labels, per_class, num_images: see `choose_labels`.
        captions: in place of these, for a generator of captions, which needs it: a file of their
            features, an image of each; see `ar_jax.data.captions`.
        sampling: see `sampling_of`.
        speculation: with fewer calls of the model, of generators that draw one code a step; the
            images say how many, and are others than without.
        composition: other models, a search; None for neither.
        seed, batch_size: see `generate`.
        step: of the checkpoint; None for the newest.
        npz: also write all images there, see `save_npz`, and how they were drawn beside it.
        strip: also write OUT_strip.png, see `save_strip`.
        frames: the same to another PNG, or a GIF.
        overwrite: files that exist already.
        progress: show a bar.

    Raises:
        ValueError: names what is wrong, before anything is drawn or written.
    """
    out = Path(out)
    strips = [out.with_name(f"{out.stem}_strip.png")] if strip else []
    strips += [] if frames is None else [Path(frames)]
    check_outputs(out, npz, *strips, overwrite=overwrite)
    config, system, params = load_system(workdir, step=step)
    channels = system.tokenizer.image_shape[-1]
    if channels not in PICTURE_CHANNELS:
        raise ValueError(
            f"--out={out}: images of {workdir} have {channels} channels, a picture 1 or 3; "
            "evaluate.py writes samples.npz"
        )
    cond = _condition(system, labels, per_class, num_images, captions)
    knobs, guidance = sampling_of(config, sampling)
    if strips and knobs.smooth:
        raise ValueError(
            "--strip and --frames decode codes step by step, which --smooth mixes: give one"
        )
    sampler = create_sampler(system, params)
    drawing = (composition or Composition()).around(sampler, workdir)
    drawing = drawing if speculation is None else speculation.sampler(drawing)
    with jax.default_matmul_precision(config["precision"]):
        drawn = generate_from(
            drawing,
            cond,
            seed=seed,
            batch_size=batch_size,
            knobs=knobs,
            guidance=guidance,
            scratch=out.parent,
            progress=progress,
        )
        shown = labels is None and num_images is None and captions is None
        columns = per_class or (10 if shown else None)
        save_png(out, image_grid(upscale(drawn.images[:MAX_GRID]), columns=columns))
        for path in strips:
            save_strip(path, sampler, drawn)
    if npz is not None:
        save_npz(npz, drawn.images, drawn.labels)
        weights = describe_weights(workdir, config, step)
        how = f"{describe_sampling(knobs, guidance)}"
        how += "" if composition is None else composition.describe(workdir)
        how += "" if speculation is None else f", {speculation}"
        record_samples(npz, f"{how}, {weights}, seed {seed}")
    return drawn


def _condition(
    system: Any,
    labels: Sequence[int] | None,
    per_class: int | None,
    num_images: int | None,
    captions: str | Path | None,
) -> Mapping[str, np.ndarray]:
    """What `sample_workdir` draws for."""
    if captions is None:
        check_class_conditional(system)
        return {"label": choose_labels(system.backbone.num_classes, labels, per_class, num_images)}
    given = {"labels": labels, "per_class": per_class, "num_images": num_images}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} does not go with --captions, which draws one image of each")
    if "caption" not in system.backbone.conditioner.fields:
        raise ValueError(f"--captions={captions}, but this generator takes classes: use --labels")
    return read_captions(captions, system.backbone.caption_length, system.backbone.caption_features)
