"""The Core ML target (being written)."""


class CoreMLTarget:
    """Placeholder until the executor lands."""
