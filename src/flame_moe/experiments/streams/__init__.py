"""Continual methods side by side on one stream: the same first stage, the same data order, settings by validation.

    python -m flame_moe.experiments.streams STREAM STORE OUT [--workers 2] [--methods flame finetune] [--seeds 3]

The first stage is learned once per seed. Each entry (a method, or a variant of FLAME) goes on from it with every
setting of its grid and seed 0; the setting that validates best is fixed, and learned with the other seeds. Nothing that
is done is redone; what was interrupted goes on at the cell. The table is OUT/table.md, table.json and table.png.
"""
