"""The embedded decoders, and how they were trained and measured."""
