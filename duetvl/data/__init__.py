"""From records, pictures and text to samples: numpy out, no framework."""
