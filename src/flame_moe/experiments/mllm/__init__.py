"""Continual methods of language models side by side: the same base, data and orders, settings by validation.

    python -m flame_moe.experiments.mllm STREAM OUT [--workers 2] [--methods routed sequential] [--seeds 3]

Each method learns order a with every setting of its grid and seed 0; the setting that validates best is fixed, and
learned with the other seeds and orders. Nothing that is done is redone; what was interrupted goes on at the cell. The
tables are OUT/table.md and OUT/table.json, their pictures OUT/table-a.png and OUT/table-b.png.
"""
