"""What a backend is: protocols, values and pure functions. numpy, pydantic and the standard library only."""
