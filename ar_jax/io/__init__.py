"""Checkpoints, metric writers and pictures on disk."""
