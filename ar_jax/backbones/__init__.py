"""Backbones: how context becomes hidden states."""
