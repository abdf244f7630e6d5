"""Data sources and Grain pipelines, uint8 on the host."""
