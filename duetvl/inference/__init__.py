"""Generation: prompts in, tokens out, on any backend."""
