"""Read a trained model, return plain numbers: routing fingerprints, footprint."""
