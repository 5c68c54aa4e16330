"""FLAME's stages on a language model with experts: dense updates of the experts, cut to low rank, read by cursor."""
