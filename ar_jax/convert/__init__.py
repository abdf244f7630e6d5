"""Official PyTorch releases <-> our parameters."""
