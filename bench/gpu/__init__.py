"""What a GPU can say in some minutes: ``python -m bench.gpu`` (``docs/gpu.md``)."""
