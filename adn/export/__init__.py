"""From an any-depth net to something that runs without this library."""
