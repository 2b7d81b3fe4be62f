"""Where decode reads an FFN's weights: one file a layout, the contract in ``base``, the choice in ``choose``."""
