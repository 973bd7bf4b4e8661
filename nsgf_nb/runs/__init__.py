"""Long runs: checkpoints, pools larger than memory, several devices."""
