"""A stream of instruction-tuning tasks that anyone can run: data, the base model, cached picture features, scoring."""
