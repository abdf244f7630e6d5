"""What the samplers that are made of another one have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

from ar_jax.api import Array, Params, System


@dataclasses.dataclass(frozen=True, kw_only=True)
class AroundSampler:
    """Has the system and the parameters of ``sampler``, and decodes as it does."""

    sampler: Any

    @property
    def system(self) -> System:
        """That of the sampler."""
        return self.sampler.system

    @property
    def params(self) -> Params:
        """Those of the sampler."""
        return self.sampler.params

    def decode(self, codes: Array, steps: int | None = None) -> Array:
        """As the sampler decodes."""
        return self.sampler.decode(codes, steps)
