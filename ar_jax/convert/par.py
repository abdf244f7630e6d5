"""PAR's releases (arXiv:2412.15119, github.com/Epiphqny/PAR).

Generators ``PAR-XL-4x.pt`` to ``PAR-3B-16x.pt``: LlamaGen's transformers and one tensor more, over
LlamaGen's tokenizer VQ-16. That tensor has a row less than a group has codes.

Options are those of `ar_jax.convert.llamagen`; ``image_size`` is 384.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ar_jax.convert import llamagen
from ar_jax.convert.part import Part, agree, shape_of
from ar_jax.convert.places import Tensors, same
from ar_jax.convert.vqgan import Shapes

TRANSITION = "spe_tok_embeddings.special_embeddings.weight"
# (width, codes of a group) of the releases -> guidance scale behind the published FID.
GUIDANCE = {(1280, 4): 1.5, (1536, 4): 1.435, (3200, 4): 1.345, (3200, 16): 1.5}

unwrap_tokenizer = llamagen.unwrap_tokenizer
unwrap_generator = llamagen.unwrap_generator
tokenizer = llamagen.tokenizer
tokenizer_part = llamagen.tokenizer_part


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above."""
    rows, width = shape_of(shapes, TRANSITION)
    regions = agree("regions", rows + 1, options, TRANSITION)
    rest = {key: shape for key, shape in shapes.items() if key != TRANSITION}
    section = llamagen.generator(rest, {"image_size": 384, **options}).section
    sampling = dict(section["sampling"])
    if (width, regions) in GUIDANCE and section["backbone"].get("null_class", True):
        sampling["guidance"] = dict(scale=GUIDANCE[width, regions])
    grid = section["schedule"]["grid"]
    schedule = dict(name="distant_groups", grid=grid, regions=regions)
    return generator_part(section | dict(schedule=schedule, sampling=sampling))


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    schedule = config["schedule"]
    if schedule["name"] != "distant_groups" or schedule["regions"] < 2:
        raise ValueError(
            f"schedule.name is {schedule['name']!r} with {schedule.get('regions')} regions; PAR's "
            "is 'distant_groups' with two at least"
        )
    part = llamagen.generator_part(config)
    places = {**part.places, TRANSITION: same("backbone/transition")}
    return Part(section=part.section, places=places, buffers=part.buffers, container=part.container)
