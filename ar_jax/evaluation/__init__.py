"""Measurements of tokenizers and generators, and their plots."""
