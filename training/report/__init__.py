"""The evidence of a checkpoint: what was measured on it, as figures, as pictures and as a model card."""
