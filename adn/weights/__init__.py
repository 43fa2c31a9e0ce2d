"""Weights on the disk: files of `adn.save`, and checkpoints that other libraries wrote. No pickle is ever run."""
