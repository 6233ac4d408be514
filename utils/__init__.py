"""The parts every training script shares; see README, "The house"."""
