"""Recorded outputs of the official code against ours."""
