"""What the benchmarks of decoding methods share."""
