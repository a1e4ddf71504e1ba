"""What the attention benchmarks share: cases, contenders, peers and page updates."""
