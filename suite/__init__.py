"""What analyses, benchmarks and training share: clips, result records, losses and figures. Not part of the library."""
