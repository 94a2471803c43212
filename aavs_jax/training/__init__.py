"""How a stage trains: phases, steps, checkpoints, the work folder, what is logged."""
