"""The parts every training script shares; docs/architecture.md is its map."""
