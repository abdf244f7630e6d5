"""Samplers: how codes are drawn."""
