"""What scripts print."""

from __future__ import annotations

import logging

from absl import logging as absl_logging


def configure_logging() -> None:
    """Shows this package's lines and everybody's warnings; checkpointing alone logs dozens a save.

    Call it from ``main``, after absl has parsed the flags.
    """
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("ar_jax").setLevel(logging.INFO)
