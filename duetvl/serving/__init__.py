"""The server: requests of OpenAI's interface over HTTP, answered by one engine."""
