"""The authors' PyTorch release: its checkpoints, and recorded runs of its code."""
