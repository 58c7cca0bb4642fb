"""Images from a model: one batch, a job on many ranks, and what the experts do meanwhile."""
