"""Comparisons: the controls that could prove us wrong."""
