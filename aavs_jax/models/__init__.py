"""The networks of all methods, one idea a file; all is Flax Linen, pure in init and apply."""
