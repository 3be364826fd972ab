"""What analyses, benchmarks and training share: clips, losses, metrics, VAEs and records. Not part of the library."""
