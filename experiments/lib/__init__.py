"""What runners share: timing, limits of the machine, loads, peers and baselines."""
