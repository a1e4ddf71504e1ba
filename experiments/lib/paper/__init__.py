"""The paper's figures: settings, simulations, curves and reports."""
