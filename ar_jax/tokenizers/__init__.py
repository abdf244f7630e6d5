"""Tokenizers: image <-> codes."""
