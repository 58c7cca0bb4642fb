"""Objectives and samplers: formulas over tensors, which know no model."""
