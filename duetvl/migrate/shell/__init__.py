"""What a shell script's variables are and what it starts, read without running any of its programs."""
