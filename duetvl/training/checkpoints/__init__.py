"""The run directory, saving, resuming, exporting."""
