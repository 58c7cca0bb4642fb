"""What a model is trained on: shards by index, order and noise as functions."""
