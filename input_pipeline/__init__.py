"""Reads and writes AVSBench: numpy in, numpy out. Imports neither jax nor aavs_jax."""
