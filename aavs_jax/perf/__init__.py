"""How fast it is: benchmarks, the peer, compilation ahead of time."""
