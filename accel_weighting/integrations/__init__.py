"""Where the weighter meets other libraries. Nothing here is imported by the core."""
