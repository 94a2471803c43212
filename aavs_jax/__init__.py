"""Audio-visual segmentation in JAX: Stepping Stones with the AAVS model."""
