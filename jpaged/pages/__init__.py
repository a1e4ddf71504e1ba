"""Page layouts (plain, packed, quantised), attention backends and their tuned sizes."""
