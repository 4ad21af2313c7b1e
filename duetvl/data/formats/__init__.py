"""Records of every layout that users have, read into conversations."""
