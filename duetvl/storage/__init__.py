"""What is on disk: files that appear whole, safetensors, model directories and checkpoints; numpy, no framework."""
