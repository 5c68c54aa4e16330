"""Samples on disk: sources, the store, preprocessing, loading and multi-task schedules."""
