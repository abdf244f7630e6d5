"""Layers shared by tokenizers, backbones and heads: attention, positions, blocks, convolutions."""
