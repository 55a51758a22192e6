"""transformers' vision models, a file a model; ``layer`` and ``embedding`` hold what they share."""
