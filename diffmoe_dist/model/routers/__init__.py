"""A router a file: which tokens go to which experts."""
