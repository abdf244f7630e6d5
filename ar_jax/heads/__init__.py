"""Heads: p(code | hidden)."""
