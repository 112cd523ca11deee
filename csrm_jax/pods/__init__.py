"""Programs for machines that are not here: compiled, measured, never run."""
