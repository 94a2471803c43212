"""The AAVS network, one idea a file; every module is Flax Linen, pure in init and apply."""
