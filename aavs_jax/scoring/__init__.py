"""How a model is scored: predictions, metrics, protocols, tables."""
