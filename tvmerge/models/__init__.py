"""Live models, whose weights are replaced in place trial after trial: one file per backend."""
