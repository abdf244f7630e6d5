"""Images of a trained generator: drawn batch by batch, as PNG, and in ADM's npz form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.build import AnySampler, build_sampling, create_sampler
from ar_jax.evaluation.captions import read_captions
from ar_jax.evaluation.coding import decode_known, decode_stages
from ar_jax.evaluation.grids import formation_strip, save_tiles, upscale
from ar_jax.evaluation.load import describe_weights, load_system
from ar_jax.evaluation.standard import record_samples
from ar_jax.io.images import PICTURE_CHANNELS, image_grid, save_png
from ar_jax.io.progress import Progress
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
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


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, ...: every prefix as balanced as can be; int32 [N]."""
    return np.arange(num_images, dtype=np.int32) % num_classes


def choose_labels(
    num_classes: int,
    labels: Sequence[int] | None = None,
    per_class: int | None = None,
    num_images: int | None = None,
) -> np.ndarray:
    """The class of every image to draw, int32 [N].

    Args:
        num_classes: of the generator.
        labels: classes to draw from; None: all.
        per_class: images of each of them, class after class.
        num_images: in place of that, N images whose classes take turns.
            Neither: one image of each of ``labels``, or ten of every class (of ten classes spread
            evenly, where there are more).

    Raises:
        ValueError: a class the generator does not know, counts below 1, or both counts.
    """
    if per_class is not None and num_images is not None:
        raise ValueError(f"--per_class={per_class} and --num_images={num_images}: give one of them")
    for name, value in (("per_class", per_class), ("num_images", num_images)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if labels is None:
        chosen = np.arange(num_classes, dtype=np.int32)
        if per_class is None and num_images is None:
            chosen = np.unique(np.arange(10, dtype=np.int32) * num_classes // 10)
            per_class = 10
    else:
        chosen = check_classes(labels, num_classes)
    if num_images is not None:
        return chosen[np.arange(num_images) % len(chosen)]
    return chosen.repeat(per_class or 1)


def check_classes(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """Labels as int32 [N]; ValueError that names one the generator does not know."""
    chosen = np.asarray(labels)
    if chosen.ndim != 1 or not len(chosen) or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"labels {labels!r} must be a list of class numbers, at least one")
    for label in chosen[(chosen < 0) | (chosen >= num_classes)]:
        raise ValueError(f"label {label} is no class: the generator knows 0 to {num_classes - 1}")
    return chosen.astype(np.int32)


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
    parts = [f"guidance {guidance.scale:g} ({', '.join(fields)})"]
    parts += [f"temperature {float(knobs.temperature):g}"]
    if len(knobs.step_temperatures):
        factors = ", ".join(f"{float(factor):g}" for factor in knobs.step_temperatures)
        parts += [f"times {factors} by step"]
    filters = {"top-k": knobs.top_k, "top-p": knobs.top_p, "min-p": knobs.min_p}
    filters |= {"choice temperature": knobs.choice_temperature}
    parts += [f"{name} {float(v):g}" for name, v in filters.items() if v]
    if knobs.confidence != Knobs().confidence:
        parts += [f"confidence by {knobs.confidence}"]
    return ", ".join(parts + ["smooth"] * knobs.smooth)


def generate(
    sampler: AnySampler,
    labels: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 100,
    knobs: Knobs | None = None,
    guidance: Guidance | None = None,
    progress: bool = False,
) -> Generated:
    """Draws one image of every class in ``labels`` [N].

    Image n depends on its label, ``seed`` and ``first + n`` alone, so other batch sizes give the
    same images up to rounding, and a long job can be done in parts. The last batch is filled up:
    one program draws all.

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
        progress=progress,
    )


def generate_from(
    sampler: AnySampler,
    cond: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 100,
    knobs: Knobs | None = None,
    guidance: Guidance | None = None,
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
    images, codes, orders = [], [], []
    with Progress(count, title="sampling", unit="image", enabled=progress) as bar:
        for start in range(0, count, batch_size):
            rows = np.arange(start, start + batch_size)
            real = min(batch_size, count - start)
            part = {name: jnp.asarray(v[np.minimum(rows, count - 1)]) for name, v in cond.items()}
            keys = image_keys(seed, first + start, batch_size)
            samples = sampler(part, keys, knobs=knobs, guidance=guidance)
            drawn = jax.device_get((_to_uint8(samples.images), samples.codes, samples.order))
            images.append(drawn[0][:real])
            codes.append(drawn[1][:real])
            if drawn[2] is not None:
                orders.append(drawn[2][:real])
            bar.advance(real)
    labels = cond.get("label", np.arange(count, dtype=np.int32))
    order = np.concatenate(orders) if orders else None
    return Generated(np.concatenate(images), labels, np.concatenate(codes), order)


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
    sampler: AnySampler,
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


def save_strip(path: str | Path, sampler: AnySampler, drawn: Generated) -> None:
    """Writes the forming of the first image of each class, up to `MAX_ROWS`, a row each."""
    first = np.sort(np.unique(drawn.labels, return_index=True)[1])[:MAX_ROWS]
    order = None if drawn.order is None else drawn.order[first]
    save_tiles(path, formation_strip(formation(sampler, drawn.codes[first], order)))


def sample_workdir(
    workdir: str | Path,
    out: str | Path,
    *,
    labels: Sequence[int] | None = None,
    per_class: int | None = None,
    num_images: int | None = None,
    captions: str | Path | None = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 100,
    step: int | None = None,
    npz: str | Path | None = None,
    strip: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Generated:
    """Draws images of a trained generator into files.

    Args:
        workdir: of the generator's run; its EMA is used, if it keeps one.
        out: the PNG: a grid of at most `MAX_GRID` images, a row a class with ``per_class``.
        labels, per_class, num_images: see `choose_labels`.
        captions: in place of these, for a generator of captions, which needs it: a file of their
            features, an image of each; see `ar_jax.evaluation.captions`.
        sampling: see `sampling_of`.
        seed, batch_size: see `generate`.
        step: of the checkpoint; None for the newest.
        npz: also write all images there, see `save_npz`, and how they were drawn beside it.
        strip: also write OUT_strip.png, see `save_strip`.
        overwrite: files that exist already.
        progress: show a bar.

    Raises:
        ValueError: names what is wrong, before anything is drawn or written.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out={out} must end in .png")
    if npz is not None and Path(npz).suffix != ".npz":
        raise ValueError(f"--npz={npz} must end in .npz")
    strip_path = out.with_name(f"{out.stem}_strip.png")
    written = [out, *([Path(npz)] if npz is not None else []), *([strip_path] if strip else [])]
    for path in written:
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists; name another file, or say --overwrite")
    config, system, params = load_system(workdir, step=step)
    channels = system.tokenizer.image_shape[-1]
    if channels not in PICTURE_CHANNELS:
        raise ValueError(
            f"--out={out}: images of {workdir} have {channels} channels, a picture 1 or 3; "
            "evaluate.py writes samples.npz"
        )
    cond = _condition(system, labels, per_class, num_images, captions)
    knobs, guidance = sampling_of(config, sampling)
    if strip and knobs.smooth:
        raise ValueError("--strip decodes codes step by step, which --smooth mixes: give one")
    sampler = create_sampler(system, params)
    with jax.default_matmul_precision(config["precision"]):
        drawn = generate_from(
            sampler,
            cond,
            seed=seed,
            batch_size=batch_size,
            knobs=knobs,
            guidance=guidance,
            progress=progress,
        )
        shown = labels is None and num_images is None and captions is None
        columns = per_class or (10 if shown else None)
        save_png(out, image_grid(upscale(drawn.images[:MAX_GRID]), columns=columns))
        if strip:
            save_strip(strip_path, sampler, drawn)
    if npz is not None:
        save_npz(npz, drawn.images, drawn.labels)
        weights = describe_weights(workdir, config, step)
        record_samples(npz, f"{describe_sampling(knobs, guidance)}, {weights}, seed {seed}")
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
