"""The AAVS network, one idea a file; every module is a Flax Linen module, pure in init and apply."""
