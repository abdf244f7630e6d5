"""The contract of quantisers, and what those with one code for every latent cell share."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ar_jax.schedules import Grid

Array = jax.Array


@flax.struct.dataclass
class Quantized:
    """The result of quantising a batch.

    Losses that a quantiser does not have (see `Quantizer.losses`) are zeros.
    """

    features: Array  # float32 [B, h, w, C], the codes' value with the encoder's gradient
    codes: Array  # int32 [B, L], or int8 [B, L, bits]
    vectors: Array  # float32 [B, L, C], what was assigned to the codes
    codebook_loss: Array  # float32 [B], pulls the codes towards the features
    commitment_loss: Array  # float32 [B], pulls the features towards the codes
    sample_entropy: Array  # scalar, mean entropy of the assignment of a vector, nats
    codebook_entropy: Array  # scalar, entropy of the mean assignment, nats

    @property
    def entropy_loss(self) -> Array:
        """Small when every vector is sure of its code and all codes are used."""
        return self.sample_entropy - self.codebook_entropy


class Quantizer(Protocol):
    """The contract of the Linen modules that `Tokenizer` relies on.

    Attributes:
        codebook_size: V, of different codes at a position.
        codebook_update: 'gradient' or 'ema', of the parameter 'codebook'; None: there is none.
        losses: which of 'codebook', 'commitment' and 'entropy' it has.
        entropy: whether it computes the entropies.
        mixes: whether `advance` takes mixed codes.
        context: 'codes' or 'features', what `advance` and `contexts` give.
    """

    codebook_size: int
    codebook_update: str | None
    losses: tuple[str, ...]
    entropy: bool
    mixes: bool
    context: str

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Grids of the steps' codes."""
        ...

    @property
    def unit_vectors(self) -> bool:
        """Whether a code stands for its codebook row's direction alone."""
        ...

    @property
    def bits(self) -> int:
        """Of a code that is kept as bits; 0 where codes are single numbers."""
        ...

    @property
    def index_size(self) -> int:
        """How many numbers `index` tells apart."""
        ...

    def index(self, codes: Array) -> Array:
        """int32 [B, L]: codes as numbers below ``index_size``, for counts of their use."""
        ...

    def quantize(self, features: Array, mask: Array | None = None) -> Quantized:
        """Straight-through features, codes and losses.

        ``mask`` float32 [B] is 0 for padding rows, which the entropies leave out; None: no row is
        padding.
        """
        ...

    def lookup(self, codes: Array, steps: int | None = None) -> Array:
        """Features [B, h, w, C] of the codes of the first ``steps`` steps (all if None)."""
        ...

    def begin(self, batch_size: int) -> Any:
        """State before any code is known."""
        ...

    def advance(self, state: Any, codes: Array, step: Any) -> tuple[Any, Array | None]:
        """(state, what the next step may see) after a step's codes [B, n].

        A quantiser that `mixes` takes weights float [B, n, V] of mixed code vectors too.
        """
        ...

    def contexts(self, codes: Array) -> Array:
        """What all steps after the first may see, one after the other: teacher forcing."""
        ...


class SingleIndex(nn.Module, kw_only=True):
    """What quantisers share whose codes are single numbers int32."""

    bits = 0

    @property
    def index_size(self: Any) -> int:
        """V."""
        return self.codebook_size

    def index(self, codes: Array) -> Array:
        """The codes themselves."""
        return codes


class OneGrid(SingleIndex, kw_only=True):
    """What quantisers share that give every cell of the latent one code, which a step sees.

    They have a method ``code_vectors``: codes [B, L] -> [B, L, C].

    Attributes:
        grid: (h, w) of the latent.
    """

    grid: Grid

    mixes = False
    context = "codes"

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The one grid of codes."""
        return (self.grid,)

    def lookup(self: Any, codes: Array, steps: Array | int | None = None) -> Array:
        """Features [B, h, w, C]; cells from position ``steps`` on are zero.

        In place of steps it takes which cells are known, bool [B, L].
        """
        chosen = self.code_vectors(codes)  # [B, L, C]
        if steps is not None and jnp.ndim(steps) == 2:
            chosen = jnp.where(jnp.asarray(steps)[..., None], chosen, 0.0)
        elif steps is not None:
            chosen = jnp.where(jnp.arange(codes.shape[1])[None, :, None] < steps, chosen, 0.0)
        return chosen.reshape(len(codes), *self.grid, chosen.shape[-1])

    def begin(self, batch_size: int) -> tuple:
        """Nothing to carry: a step sees codes themselves."""
        return ()

    def advance(self, state: tuple, codes: Array, step: Array | int) -> tuple[tuple, Array]:
        """The next step's context is this step's codes."""
        return state, codes

    def contexts(self, codes: Array) -> Array:
        """int32 [B, L - 1]: every code but the last, which no step sees."""
        return codes[:, :-1]


def of_vectors(mask: Array | None, count: int) -> Array | None:
    """The mask [B] of images for ``count`` = B n vectors of theirs, image after image: [count]."""
    return None if mask is None else mask.repeat(count // len(mask), total_repeat_length=count)
