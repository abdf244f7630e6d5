"""The axes of the design space: one plain dict each, name in a config -> what it builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from ar_jax import schedules
from ar_jax.backbones.bidirectional import Bidirectional
from ar_jax.backbones.cross_decoder import CrossDecoder
from ar_jax.backbones.decoder import Decoder
from ar_jax.backbones.encoder_decoder import EncoderDecoder
from ar_jax.backbones.fractal import Fractal
from ar_jax.backbones.instructed_decoder import InstructedDecoder
from ar_jax.backbones.noisy_decoder import NoisyDecoder
from ar_jax.backbones.shuffled_decoder import ShuffledDecoder
from ar_jax.backbones.two_pass_decoder import TwoPassDecoder
from ar_jax.entities import next_entity
from ar_jax.heads.bitwise import BitwiseHead
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.heads.diffusion import DiffusionHead
from ar_jax.heads.energy import EnergyHead
from ar_jax.heads.flow import FlowHead, VelocityHead
from ar_jax.heads.mixture import MixtureHead
from ar_jax.heads.pixels import PixelHead
from ar_jax.nn.discriminators import PatchDiscriminator, PooledDiscriminator, StyleDiscriminator
from ar_jax.objectives.flow_matching import FlowMatching
from ar_jax.objectives.kl_tokenizer import KLTokenizerObjective
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.masked import Masked
from ar_jax.objectives.masked_codes import MaskedCodes
from ar_jax.objectives.nested import NestedLikelihood
from ar_jax.objectives.tokenizer import TokenizerObjective
from ar_jax.sampling.confidence import ConfidenceSampler
from ar_jax.sampling.flow import FlowSampler
from ar_jax.sampling.loop import CachedSampler
from ar_jax.sampling.nested import NestedSampler
from ar_jax.sampling.refine import RefineSampler
from ar_jax.schedules import Schedule
from ar_jax.tokenizers.autoencoder import Autoencoder
from ar_jax.tokenizers.bitwise import MultiScaleBitwiseQuantizer
from ar_jax.tokenizers.finite_scalar import FiniteScalarQuantizer
from ar_jax.tokenizers.kl import KLTokenizer
from ar_jax.tokenizers.lookup_free import BinarySphericalQuantizer, LookupFreeQuantizer
from ar_jax.tokenizers.pixels import PixelTokenizer
from ar_jax.tokenizers.pooled_autoencoder import PooledAutoencoder
from ar_jax.tokenizers.quantizers import MultiScaleQuantizer, VectorQuantizer

QUANTIZERS = {
    "vq": VectorQuantizer,
    "multiscale_vq": MultiScaleQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
    "multiscale_bitwise": MultiScaleBitwiseQuantizer,
}
TOKENIZERS = {**QUANTIZERS, "kl": KLTokenizer, "pixels": PixelTokenizer}
AUTOENCODERS = {"strided": Autoencoder, "pooled": PooledAutoencoder}
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "raster": schedules.raster,
    "random": schedules.random,
    "next_scale": schedules.next_scale,
    "masked": schedules.masked,
    "random_groups": schedules.random_groups,
    "distant_groups": schedules.distant_groups,
    "next_entity": next_entity,
    "nested": schedules.nested,
}
# Why the others take no `anneal`, random orders that give way to their own.
NOT_ANNEALED = {
    "raster": "use 'random', which is raster order after random ones, code by code",
    "next_scale": "a scale codes what the coarser ones leave over, so that it has no other order",
    "masked": "its sets are of random codes in sampling too, so that there is no order to end with",
    "next_entity": "its rows are placed by the entities' own order, and tell no other",
    "nested": "patches are within patches in one order, and masked levels are random in themselves",
}
BACKBONES = {
    "decoder": Decoder,
    "shuffled_decoder": ShuffledDecoder,
    "cross_decoder": CrossDecoder,
    "encoder_decoder": EncoderDecoder,
    "instructed_decoder": InstructedDecoder,
    "two_pass_decoder": TwoPassDecoder,
    "bidirectional": Bidirectional,
    "noisy_decoder": NoisyDecoder,
    "fractal": Fractal,
}
HEADS = {
    "categorical": CategoricalHead,
    "bitwise": BitwiseHead,
    "diffusion": DiffusionHead,
    "energy": EnergyHead,
    "mixture": MixtureHead,
    "velocity": VelocityHead,
    "flow": FlowHead,
    "pixels": PixelHead,
}
TOKENIZER_OBJECTIVES = {"tokenizer": TokenizerObjective, "kl_tokenizer": KLTokenizerObjective}
DISCRIMINATORS = {
    "patchgan": PatchDiscriminator,
    "stylegan": StyleDiscriminator,
    "pooled": PooledDiscriminator,
}
OBJECTIVES = {
    **TOKENIZER_OBJECTIVES,
    "likelihood": Likelihood,
    "masked": Masked,
    "masked_codes": MaskedCodes,
    "flow_matching": FlowMatching,
    "nested": NestedLikelihood,
}
# How codes are drawn is the backbone's: with a cache step by step, or all that is known each time;
# see `ar_jax.build.sampler_of` for heads that have a sampler of their own.
AnySampler: TypeAlias = (
    CachedSampler | RefineSampler | ConfidenceSampler | FlowSampler | NestedSampler
)
SAMPLERS: dict[type, Any] = {
    Decoder: CachedSampler,
    ShuffledDecoder: CachedSampler,
    CrossDecoder: CachedSampler,
    InstructedDecoder: CachedSampler,
    TwoPassDecoder: CachedSampler,
    EncoderDecoder: RefineSampler,
    Bidirectional: ConfidenceSampler,
    Fractal: NestedSampler,
}
