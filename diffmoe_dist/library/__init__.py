"""For Python programs: a model that understands what it is given, its sampler, and diffusers' pipelines."""
