"""The files of configs/, and which fields of a configuration are read by what is built from it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import ar_jax
from ar_jax.api import Batch
from ar_jax.backbones.bidirectional import Bidirectional
from ar_jax.backbones.cross_decoder import CrossDecoder
from ar_jax.backbones.decoder import Decoder
from ar_jax.backbones.encoder_decoder import EncoderDecoder
from ar_jax.backbones.fractal import Fractal
from ar_jax.backbones.instructed_decoder import InstructedDecoder
from ar_jax.backbones.noisy_decoder import NoisyDecoder
from ar_jax.backbones.patch_levels import CausalLevel, MaskedLevel
from ar_jax.backbones.shuffled_decoder import FusionBlock, ShuffledDecoder
from ar_jax.backbones.two_pass_decoder import TwoPassDecoder
from ar_jax.build import build_objective, build_sampling, trains_tokenizer
from ar_jax.data import Data, from_config
from ar_jax.data.transforms import ImageTransform
from ar_jax.heads.bitwise import BitwiseHead
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.heads.diffusion import DiffusionHead
from ar_jax.heads.energy import EnergyHead
from ar_jax.heads.flow import FlowHead, VelocityHead
from ar_jax.heads.mixture import MixtureHead
from ar_jax.heads.pixels import PixelHead
from ar_jax.nn import conv, pooled_conv
from ar_jax.nn.blocks import Attention, Block, Stack
from ar_jax.nn.layers import MLP
from ar_jax.objectives.flow_matching import FlowMatching
from ar_jax.objectives.kl_tokenizer import KLTokenizerObjective
from ar_jax.objectives.likelihood import Likelihood, init_tokenizer
from ar_jax.objectives.masked import Masked
from ar_jax.objectives.masked_codes import MaskedCodes
from ar_jax.objectives.nested import NestedLikelihood
from ar_jax.objectives.perceptual import frozen_shapes
from ar_jax.objectives.tokenizer import TokenizerObjective
from ar_jax.parallel.rules import path_name
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.tokenizers.autoencoder import Autoencoder
from ar_jax.tokenizers.bitwise import MultiScaleBitwiseQuantizer
from ar_jax.tokenizers.finite_scalar import FiniteScalarQuantizer
from ar_jax.tokenizers.kl import KLTokenizer
from ar_jax.tokenizers.lookup_free import BinarySphericalQuantizer, LookupFreeQuantizer
from ar_jax.tokenizers.pixels import PixelTokenizer
from ar_jax.tokenizers.pooled_autoencoder import PooledAutoencoder
from ar_jax.tokenizers.quantizers import MultiScaleQuantizer, VectorQuantizer
from ar_jax.train.fields import read_settings
from ar_jax.train.perceptual import load_perceptual
from ar_jax.train.run import check_classes, check_images, check_sections, load_tokenizer
from ar_jax.train.start_from import read_init_from

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(Path(ar_jax.__file__).parent)

Config: TypeAlias = Any  # a ConfigDict

# What a section becomes, from the first to the last that gets the field. A field is read if the
# last of them that has it looks at it: passing it on is not enough.
TAKERS: dict[str, tuple[type, ...]] = {
    "data": (ImageTransform,),
    "tokenizer": (
        *(VectorQuantizer, MultiScaleQuantizer, KLTokenizer, FiniteScalarQuantizer),
        *(BinarySphericalQuantizer, LookupFreeQuantizer, MultiScaleBitwiseQuantizer),
        PixelTokenizer,
    ),
    "tokenizer.autoencoder": (
        *(Autoencoder, conv.Encoder, conv.Decoder),
        *(PooledAutoencoder, pooled_conv.PooledEncoder, pooled_conv.PooledDecoder),
    ),
    "backbone": (
        *(Decoder, CrossDecoder, EncoderDecoder, InstructedDecoder, TwoPassDecoder, Bidirectional),
        *(NoisyDecoder, ShuffledDecoder, FusionBlock, Fractal, CausalLevel, MaskedLevel),
        *(Stack, Block, Attention, MLP),
    ),
    "head": (
        *(CategoricalHead, BitwiseHead, DiffusionHead, EnergyHead, MixtureHead),
        *(VelocityHead, FlowHead, PixelHead),
    ),
    "objective": (
        *(TokenizerObjective, KLTokenizerObjective, Likelihood, Masked, MaskedCodes),
        *(FlowMatching, NestedLikelihood),
    ),
    "sampling": (Knobs,),
    "sampling.guidance": (Guidance,),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A file of configs/ and one of its arguments."""

    file: str  # relative to the repository
    argument: str

    def __str__(self) -> str:
        return f"{Path(self.file).relative_to('configs').with_suffix('')}:{self.argument}"

    @property
    def config(self) -> Config:
        """A fresh copy."""
        return load(self.file).get_config(self.argument)


@functools.cache
def load(file: str) -> ModuleType:
    """The module of a file, relative to the repository."""
    name = "_".join(Path(file).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, ROOT / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(module: ModuleType) -> tuple[str, ...]:
    """Those that a file names: its MODES or its SIZES."""
    found = [getattr(module, name) for name in ("MODES", "SIZES") if hasattr(module, name)]
    assert len(found) == 1, f"{module.__file__} must have either MODES or SIZES"
    return tuple(found[0])


FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py"))
CASES = [Case(file, argument) for file in FILES for argument in arguments(load(file))]


@functools.cache
def parameters(case: Case) -> Any:
    """ShapeDtypeStructs of what a run of ``case`` trains."""
    return jax.eval_shape(build_objective(case.config).init, jax.random.key(0))


def named(tree: Any) -> dict[str, Any]:
    """'a/b/c' -> leaf."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class Recorder(Mapping[str, Any]):
    """A configuration that notes the 'a.b.c' of every field that is taken out of it."""

    def __init__(self, config: Mapping[str, Any], seen: set[str], prefix: str = "") -> None:
        self._config, self._seen, self._prefix = config, seen, prefix

    def __getitem__(self, name: str) -> Any:
        value = self._config[name]
        if isinstance(value, ml_collections.ConfigDict | Mapping):
            return Recorder(value, self._seen, f"{self._prefix}{name}.")
        self._seen.add(self._prefix + name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


def leaves(config: Mapping[str, Any], prefix: str = "") -> set[str]:
    """'a.b.c' of every field."""
    names: set[str] = set()
    for name in config:
        value = config[name]
        section = isinstance(value, ml_collections.ConfigDict | Mapping)
        names |= leaves(value, f"{prefix}{name}.") if section else {prefix + name}
    return names


def unread_fields(config: Config, workdir: Path) -> set[str]:
    """'a.b.c' of the fields that a run of ``config`` would not look at.

    A field may be taken out of the configuration by nobody, or end in a module that in this
    configuration does nothing with it. The images are synthetic, whatever the configuration says.
    """
    config = config.copy_and_resolve_references()
    config.data.source = "synthetic"
    seen: set[str] = set()
    with attribute_reads() as reads:
        consume(Recorder(config, seen), workdir)
    unread = leaves(config) - seen
    for path in leaves(config):
        section, _, name = path.rpartition(".")
        takers = [taker for taker in TAKERS.get(section, ()) if name in field_names(taker)]
        used = {taker for taker in takers if any(key[0] is taker for key in reads)}
        if used and (max(used, key=takers.index), name) not in reads:
            unread.add(path)
    return unread


def consume(config: Any, workdir: Path) -> None:
    """Everything that a run does with a configuration, and one traced step of it."""
    check_sections(config)
    read_settings(config)
    read_init_from(config)
    objective: Any = build_objective(config)
    data = {split: from_config(config["data"], split) for split in ("train", "test")}
    if trains_tokenizer(config):
        check_images(config, objective.tokenizer.image_shape)
        batch: Batch = {"image": jnp.zeros((1, *objective.tokenizer.image_shape), jnp.uint8)}
        with contextlib.suppress(ValueError):  # weights that are not here
            load_perceptual(objective, workdir)
        frozen = frozen_shapes(objective)
    else:
        system = objective.system
        check_images(config, system.tokenizer.image_shape)
        check_classes(config)
        frozen = {
            "tokenizer": jax.eval_shape(lambda k: init_tokenizer(system, k), jax.random.key(0))
        }
        if jax.tree.leaves(frozen):
            with pytest.raises(ValueError, match="tokenizer_checkpoint is empty"):
                load_tokenizer(config, workdir, system)
        else:
            assert load_tokenizer(config, workdir, system) == {}
        knobs, guidance = build_sampling(config)
        knobs.as_arrays()
        guidance.scales(system.schedule.num_steps)
        tokenizer = system.tokenizer
        batch = {"codes": jnp.zeros((1, *tokenizer.encoding_shape), tokenizer.codes_dtype)}
    batch["label"] = jnp.zeros((1,), jnp.int32)
    cut_one(data["train"])

    def step(key: jax.Array, frozen: Any) -> Any:
        params = objective.init(key)
        stats = objective.init_stats(params)
        loss, aux = objective.loss(params, stats, frozen, batch, key, train=True)
        return loss, objective.finish(params, stats, aux.sums, aux.last, key)

    jax.eval_shape(step, jax.random.key(0), frozen)


def cut_one(data: Data) -> None:
    """One image through the transform of training."""
    assert data.transform is not None
    side = data.transform.size
    rng = np.random.default_rng(0)
    image = np.zeros((side, side, data.source.channels), np.uint8)
    assert data.transform(image, rng).shape == image.shape


@functools.cache
def field_names(taker: type) -> frozenset[str]:
    """Without those that every Linen module has."""
    assert dataclasses.is_dataclass(taker)
    return frozenset(field.name for field in dataclasses.fields(taker)) - {"name", "parent"}


@contextlib.contextmanager
def attribute_reads() -> Iterator[set[tuple[type, str]]]:
    """Notes (class, field) whenever code of ar_jax reads a field of an instance of a taker.

    Not noted: what flax and dataclasses do with all fields alike, and checks of their range.
    """
    reads: set[tuple[type, str]] = set()

    def spy(taker: type) -> Any:
        def getattribute(self: Any, name: str) -> Any:
            if name in field_names(taker):
                code = sys._getframe(1).f_code
                if code.co_filename.startswith(PACKAGE) and code.co_name != "__post_init__":
                    reads.add((taker, name))
            return object.__getattribute__(self, name)

        return getattribute

    with pytest.MonkeyPatch.context() as patch:
        for taker in {taker for takers in TAKERS.values() for taker in takers}:
            patch.setattr(taker, "__getattribute__", spy(taker), raising=False)
        yield reads
