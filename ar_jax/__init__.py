"""ar_jax: autoregressive image generation in JAX and Flax."""
