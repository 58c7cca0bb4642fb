"""Scores of images: nothing here makes any."""
