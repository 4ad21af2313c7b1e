"""Pictures and videos: sizes from headers, then pixels as patch rows."""
