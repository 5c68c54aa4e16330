"""The published design, restated from its description to be measured against.

Loops over modalities and experts, dispatch by non-zero gates, stacks rebuilt in every call, expanded time attention.

Nothing here is used by the package, and nothing here is improved: where it is slow, it is slow as published.
"""
