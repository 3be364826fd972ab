"""What is generated in docs/: the reference, outputs of real runs, the diagram."""
