"""What every attention backend shares: record, operands, page layouts, tile sizes."""
